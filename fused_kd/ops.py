"""The row operations as the PyTorch operators that torch.compile sees as a whole.

The backend is chosen when an operator runs. Vectors with one number a row are float32, or float64 where one of the
logits is. What a fake kernel allocates is what the real one does. Both check their operands (`fused_kd.operands`).

The options are those of RowOptions, and after them `symbolic`: None, or what replaces the numbers among them, a tensor
[temperature, teacher_temperature, label_smoothing, *parameters], float64 on the CPU. torch.compile keeps a number that
changes from call to call symbolic in a tensor; as an argument it would be a constant, and each of its values compiled
anew.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fused_kd import backends
from fused_kd.backends.rows import STATS, Backend, LogitRows, RowOptions, row_dtype
from fused_kd.checks import check_no_overlap
from fused_kd.gradient_memory import empty_gradient
from fused_kd.operands import checked, register_odd_operands


def forward(student: Tensor, teacher: Tensor, targets: Tensor, options: RowOptions) -> tuple[Tensor, Tensor, Tensor]:
    """soft[N], hard[N], and stats[N, STATS]: what the gradient needs of each row."""
    rows = LogitRows(student, teacher, targets, options)
    return _backend_for(rows).rows_forward(rows)


def backward(student: Tensor, *rest: Any) -> Tensor:
    """The gradient of sum(grad_soft * soft + grad_hard * hard), contiguous, in the student's dtype and shape."""
    out = empty_gradient(student)
    _backward(out, student, *rest)
    return out


def backward_(student: Tensor, *rest: Any) -> None:
    """The same, written over the student's logits."""
    check_no_overlap(student)  # a compiled caller could not
    _backward(student, student, *rest)


def _backward(
    out: Tensor,
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    stats: Tensor,
    grad_soft: Tensor,
    grad_hard: Tensor,
    options: RowOptions,
) -> None:
    rows = LogitRows(student, teacher, targets, options)
    _backend_for(rows).rows_backward(rows, stats, grad_soft, grad_hard, out)


def fused(
    student: Tensor, teacher: Tensor, targets: Tensor, coef_soft: Tensor, coef_hard: Tensor, options: RowOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """soft[N], hard[N] and the gradient of sum(coef_soft * soft + coef_hard * hard), in one visit of each row."""
    out = empty_gradient(student)
    rows = LogitRows(student, teacher, targets, options)
    soft, hard = _backend_for(rows).rows_fused(rows, coef_soft, coef_hard, out)
    return soft, hard, out


def _backend_for(rows: LogitRows) -> Backend:
    return backends.choose(rows.options.backend, rows.student, rows.teacher, rows.options.divergence)


def _empty_rows(student: Tensor, teacher: Tensor, targets: Tensor, *shape: int) -> Tensor:
    return student.new_empty(targets.shape[0], *shape, dtype=row_dtype(student, teacher))


def _fake_forward(student: Tensor, teacher: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = (student, teacher, targets)
    return _empty_rows(*rows), _empty_rows(*rows), _empty_rows(*rows, STATS)


def _fake_backward(student: Tensor, *rest: Any) -> Tensor:
    return student.new_empty(student.shape)


def _fake_fused(student: Tensor, teacher: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = (student, teacher, targets)
    return _empty_rows(*rows), _empty_rows(*rows), student.new_empty(student.shape)


_SCHEMA = {float: "float", str: "str", bool: "bool", tuple[float, ...]: "float[]"}


def _operator(
    name: str, real: Callable[..., Any], fake: Callable[..., Any], signature: str, mutates: Sequence[str] = ()
) -> Any:
    """Registers `real` as fused_kd::name. `signature` leaves out the options, which are those of RowOptions and reach
    `real` and `fake` as one."""
    arguments, result = signature.split(" -> ")
    options = ", ".join(f"{_SCHEMA[kind]} {option}" for option, kind in RowOptions.__annotations__.items())
    options += "=[]"  # the parameters
    names = [argument.split()[-1] for argument in arguments.split(", ")]

    def registered(kernel: Callable[..., Any], read: bool) -> Callable[..., Any]:
        return lambda *arguments: kernel(*checked(names, arguments, read))

    name = f"fused_kd::{name}"
    schema = f"({arguments}, {options}, Tensor? symbolic=None) -> {result}"
    operator = torch.library.custom_op(name, registered(real, read=True), mutates_args=mutates, schema=schema)
    operator.register_fake(registered(fake, read=False))
    register_odd_operands(name, operator, names, mutates)
    return operator


_LOGITS = "Tensor student, Tensor teacher, Tensor targets"
_MUTATED = "Tensor(a!) student, Tensor teacher, Tensor targets"
_GRADS = "Tensor stats, Tensor grad_soft, Tensor grad_hard"
_COEFS = "Tensor coef_soft, Tensor coef_hard"

rows_forward = _operator("rows_forward", forward, _fake_forward, f"{_LOGITS} -> (Tensor, Tensor, Tensor)")
rows_backward = _operator("rows_backward", backward, _fake_backward, f"{_LOGITS}, {_GRADS} -> Tensor")
rows_backward_ = _operator("rows_backward_", backward_, lambda *_: None, f"{_MUTATED}, {_GRADS} -> ()", ["student"])
rows_fused = _operator("rows_fused", fused, _fake_fused, f"{_LOGITS}, {_COEFS} -> (Tensor, Tensor, Tensor)")


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, symbolic = *inputs[:3], output[2], inputs[-1]
    ctx.save_for_backward(*tensors, symbolic)
    ctx.options = inputs[3:-1]


def _rows_gradient(ctx: Any, grad_soft: Tensor, grad_hard: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, symbolic = ctx.saved_tensors
    gradient = rows_backward(*tensors, grad_soft, grad_hard, *ctx.options, symbolic)
    return gradient, *(None,) * (3 + len(ctx.options))


def no_second_derivative(*_: Any) -> NoReturn:
    raise RuntimeError(
        "fused_kd has no second derivative (double backward); use fused_kd.reference.kd_loss where you need one"
    )


# For who calls the operators, and for a graph that torch.export made of them; the loss has its own way (autograd.py).
rows_forward.register_autograd(_rows_gradient, setup_context=_save_rows)
rows_backward.register_autograd(no_second_derivative)


def _over_a_batch(operator: Any) -> None:
    """Registers what torch.func.vmap makes of an operator: the batch becomes the first dimension of the rows."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        batch = info.batch_size

        def leading(x: Tensor, dim: int | None) -> Tensor:
            return x.expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)

        count = next(i for i, x in enumerate(arguments) if not isinstance(x, Tensor))
        tensors = [leading(x, dim) for x, dim in zip(arguments[:count], in_dims[:count], strict=True)]
        logits, vectors = tensors[:2], [x.flatten(0, 1) for x in tensors[2:]]
        results = operator(*logits, *vectors, *arguments[count:])
        if isinstance(results, Tensor):  # a gradient, in the student's shape
            return results, 0
        split = tuple(x if x.shape == logits[0].shape else x.unflatten(0, (batch, -1)) for x in results)
        return split, (0,) * len(split)

    operator.register_vmap(rule)


for _each in (rows_forward, rows_backward, rows_fused):
    _over_a_batch(_each)
