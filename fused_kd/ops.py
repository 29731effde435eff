"""The row operations as the PyTorch operators that torch.compile sees as a whole.

The backend is chosen when an operator runs. Vectors with one number a row are float32, or float64 where one of the
logits is. What a fake kernel allocates is what the real one does. Both check their operands (`fused_kd.operands`).

`rows_*` take a teacher's logits, `teachers_*` what other kinds of teachers have (`fused_kd.teachers`), as a list of
tensors and the kind's name.

The options are those of RowOptions, and after them `symbolic`: None, or what replaces the numbers among them, a tensor
[temperature, teacher_temperature, label_smoothing, *parameters, *caps], float64 on the CPU. torch.compile keeps a
number that changes from call to call symbolic in a tensor; as an argument it would be a constant, and each of its
values compiled anew.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fused_kd import backends, capped
from fused_kd.backends.rows import REST, RowOptions, new_results
from fused_kd.checks import check_no_overlap
from fused_kd.gradient_memory import empty_gradient
from fused_kd.operands import checked, register_odd_operands
from fused_kd.taught import LOGITS, TaughtRows, Teacher
from fused_kd.teachers import row_dtypes


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """soft[N], hard[N], and stats[N, k]: what the gradient needs of each row."""
    return capped.rows_forward(_rows(*arguments))


def write_gradient(
    student: Tensor,
    teacher: Tensor | Sequence[Tensor],
    targets: Tensor,
    stats: Tensor,
    grad_soft: Tensor,
    grad_hard: Tensor,
    *rest: Any,
) -> None:
    *kind_and_options, out = rest
    capped.rows_backward(_rows(student, teacher, targets, *kind_and_options), stats, grad_soft, grad_hard, out)


def _rows(student: Tensor, teacher: Tensor | Sequence[Tensor], targets: Tensor, *kind_and_options: Any) -> TaughtRows:
    *kind, options = kind_and_options
    if not isinstance(teacher, Tensor):
        return TaughtRows(student, Teacher(kind[0], teacher), targets, options)
    if not options.caps:  # capped logits have another dtype
        compared = student if options.divergence == REST else teacher  # of ids there is nothing to refuse
        backend = backends.choose(options.backend, student, compared, options.divergence)
        options = options._replace(backend=backend.NAME)
    return TaughtRows(student, Teacher(LOGITS, (teacher,)), targets, options)


def _new(write: Callable[..., None]) -> Callable[..., Tensor]:
    """The gradient of sum(grad_soft * soft + grad_hard * hard), contiguous, in the student's dtype and shape."""

    def backward(student: Tensor, *rest: Any) -> Tensor:
        out = empty_gradient(student)
        write(student, *rest, out)
        return out

    return backward


def _in_place(write: Callable[..., None]) -> Callable[..., None]:
    """The same, written over the student's logits."""

    def backward_(student: Tensor, *rest: Any) -> None:
        check_no_overlap(student)  # a compiled caller could not
        write(student, *rest, student)

    return backward_


def fused(
    student: Tensor, teacher: Tensor, targets: Tensor, coef_soft: Tensor, coef_hard: Tensor, options: RowOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """soft[N], hard[N] and the gradient of sum(coef_soft * soft + coef_hard * hard), in one visit of each row."""
    out = empty_gradient(student)
    return *capped.rows_fused(_rows(student, teacher, targets, options), coef_soft, coef_hard, out), out


def _fake_forward(
    student: Tensor, teacher: Tensor | Sequence[Tensor], targets: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    given = Teacher(LOGITS, (teacher,)) if isinstance(teacher, Tensor) else Teacher(rest[0], teacher)
    return new_results(student, targets, row_dtypes(student, given))


def _fake_entropy(student: Tensor, *rest: Any) -> Tensor:
    soft, _, _ = _fake_forward(student, *rest)
    return soft


def _fake_backward(student: Tensor, *rest: Any) -> Tensor:
    return student.new_empty(student.shape)


def _fake_fused(student: Tensor, teacher: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    soft, hard, _ = _fake_forward(student, teacher, targets)
    return soft, hard, student.new_empty(student.shape)


_SCHEMA = {float: "float", str: "str", bool: "bool", tuple[float, ...]: "float[]"}


def operator(
    name: str,
    real: Callable[..., Any],
    fake: Callable[..., Any],
    signature: str,
    mutates: Sequence[str] = (),
    check: Callable[..., tuple[Any, ...]] = checked,
) -> Any:
    """Registers `real` as fused_kd::name. `signature` leaves out the options, which are those of RowOptions and reach
    `real` and `fake` as one, once `check` has seen them."""
    arguments, results = signature.split(" -> ")
    options = ", ".join(
        f"{_SCHEMA[kind]} {option}" + ("=[]" if option in RowOptions._field_defaults else "")
        for option, kind in RowOptions.__annotations__.items()
    )
    names = [argument.split()[-1] for argument in arguments.split(", ")]

    def registered(kernel: Callable[..., Any], read: bool) -> Callable[..., Any]:
        return lambda *arguments: kernel(*check(names, arguments, read))

    name = f"fused_kd::{name}"
    schema = f"({arguments}, {options}, Tensor? symbolic=None) -> {results}"
    result = torch.library.custom_op(name, registered(real, read=True), mutates_args=mutates, schema=schema)
    result.register_fake(registered(fake, read=False))
    register_odd_operands(name, result, names, mutates)
    return result


def _pair(
    name: str, forward: Callable[..., Any], write: Callable[..., None], teacher: str, kind: str
) -> tuple[Any, ...]:
    """<name>_forward, <name>_backward and <name>_backward_, which overwrites the student."""
    rows = f"Tensor student, {teacher}, Tensor targets"
    grads = f"{rows}, Tensor stats, Tensor grad_soft, Tensor grad_hard{kind} ->"
    return (
        operator(f"{name}_forward", forward, _fake_forward, f"{rows}{kind} -> (Tensor, Tensor, Tensor)"),
        operator(f"{name}_backward", _new(write), _fake_backward, f"{grads} Tensor"),
        operator(
            f"{name}_backward_", _in_place(write), lambda *_: None, f"{grads} ()".replace(" ", "(a!) ", 1), ["student"]
        ),
    )


rows_forward, rows_backward, rows_backward_ = _pair("rows", forward, write_gradient, "Tensor teacher", "")
rows_fused = operator(
    "rows_fused",
    fused,
    _fake_fused,
    "Tensor student, Tensor teacher, Tensor targets, Tensor coef_soft, Tensor coef_hard -> (Tensor, Tensor, Tensor)",
)
teachers_forward, teachers_backward, teachers_backward_ = _pair(
    "teachers", forward, write_gradient, "Tensor[] teacher", ", str kind"
)
teachers_entropy = operator(
    "teachers_entropy",
    lambda *arguments: capped.rows_entropy(_rows(*arguments)),
    _fake_entropy,
    "Tensor student, Tensor[] teacher, Tensor targets, str kind -> Tensor",
)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, targets, *ctx.options, symbolic = inputs
    ctx.listed = not isinstance(teacher, Tensor)
    ctx.save_for_backward(student, targets, output[2], symbolic, *(teacher if ctx.listed else [teacher]))


def _rows_gradient(ctx: Any, grad_soft: Tensor, grad_hard: Tensor, _: Tensor) -> tuple[Any, ...]:
    student, targets, stats, symbolic, *teacher = ctx.saved_tensors
    backward, given = (teachers_backward, teacher) if ctx.listed else (rows_backward, teacher[0])
    gradient = backward(student, given, targets, stats, grad_soft, grad_hard, *ctx.options, symbolic)
    of_teacher = [None] * len(teacher) if ctx.listed else None
    # (Not one for each of the inputs: of a list of tensors PyTorch 2.11 does not count what was left to its default.)
    return gradient, of_teacher, *(None,) * (len(ctx.needs_input_grad) - 2)


def no_second_derivative(*_: Any) -> NoReturn:
    raise RuntimeError(
        "fused_kd has no second derivative (double backward); use fused_kd.reference.kd_loss where you need one"
    )


# For who calls the operators, and for a graph that torch.export made of them; the loss has its own way (autograd.py).
for _each in (rows_forward, teachers_forward):
    _each.register_autograd(_rows_gradient, setup_context=_save_rows)
for _each in (rows_backward, teachers_backward):
    _each.register_autograd(no_second_derivative)


def _over_a_batch(operator: Any) -> None:
    """Registers what torch.func.vmap makes of an operator: the batch becomes the first dimension of the rows."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        batch = info.batch_size

        def leading(x: Any, dim: Any) -> Any:
            if not isinstance(x, Tensor):
                return [leading(*pair) for pair in zip(x, dim, strict=True)]
            return x.expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)

        count = next(i for i, x in enumerate(arguments) if not isinstance(x, Tensor | list | tuple))
        student, teacher, *vectors = (leading(*pair) for pair in zip(arguments[:count], in_dims[:count], strict=True))
        results = operator(student, teacher, *(x.flatten(0, 1) for x in vectors), *arguments[count:])
        single = isinstance(results, Tensor)
        # (A gradient has the student's shape.)
        split = [
            x if x.shape == student.shape else x.unflatten(0, (batch, -1)) for x in ([results] if single else results)
        ]
        return (split[0], 0) if single else (tuple(split), (0,) * len(split))

    operator.register_vmap(rule)


for _each in (rows_forward, rows_backward, rows_fused, teachers_forward, teachers_backward, teachers_entropy):
    _over_a_batch(_each)
