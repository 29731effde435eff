"""The row operations as PyTorch operators, so that torch.compile sees each as a whole.

The backend is chosen when an operator runs. Vectors with one number a row are float32, or float64 where one of the
logits is. What a fake kernel allocates is what the real one does.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fused_kd import backends
from fused_kd.backends.rows import STATS, RowOptions, row_dtype
from fused_kd.checks import check_no_overlap

# RowOptions, as operators take it.
_OPTIONS = (
    "float temperature, float teacher_temperature, str divergence, float label_smoothing, "
    "bool soft, bool hard, str backend"
)
_LOGITS = "Tensor teacher, Tensor targets"
_GRADS = "Tensor stats, Tensor grad_soft, Tensor grad_hard"


def _operator(
    name: str, signature: str, fake: Callable[..., Any], mutates: Iterable[str] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function as the operator fused_kd::name; `fake` allocates what it does and computes nothing."""
    arguments, result = signature.split(" -> ")
    schema = f"({arguments}, {_OPTIONS}) -> {result}"

    def register(real: Callable[..., Any]) -> Any:
        operator = torch.library.custom_op(f"fused_kd::{name}", real, mutates_args=mutates, schema=schema)
        operator.register_fake(fake)
        return operator

    return register


def _empty_rows(student: Tensor, teacher: Tensor, targets: Tensor, *shape: int) -> Tensor:
    return student.new_empty(targets.shape[0], *shape, dtype=row_dtype(student, teacher))


def _fake_forward(student: Tensor, teacher: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = (student, teacher, targets)
    return _empty_rows(*rows), _empty_rows(*rows), _empty_rows(*rows, STATS)


@_operator("rows_forward", f"Tensor student, {_LOGITS} -> (Tensor, Tensor, Tensor)", _fake_forward)
def rows_forward(student: Tensor, teacher: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """soft[N], hard[N], and stats[N, STATS]: what the gradient needs of each row."""
    rows = RowOptions(*options)
    return backends.choose(rows.backend, student, teacher).rows_forward(student, teacher, targets, rows)


def _fake_backward(student: Tensor, *rest: Any) -> Tensor:
    return student.new_empty(student.shape)


@_operator("rows_backward", f"Tensor student, {_LOGITS}, {_GRADS} -> Tensor", _fake_backward)
def rows_backward(student: Tensor, *rest: Any) -> Tensor:
    """The gradient of sum(grad_soft * soft + grad_hard * hard), contiguous, in the student's dtype and shape."""
    out = student.new_empty(student.shape)
    _backward(student, *rest, out=out)
    return out


@_operator("rows_backward_", f"Tensor(a!) student, {_LOGITS}, {_GRADS} -> ()", lambda *_: None, ("student",))
def rows_backward_(student: Tensor, *rest: Any) -> None:
    """The same, written over the student's logits."""
    check_no_overlap(student)  # a compiled caller could not
    _backward(student, *rest, out=student)


def _backward(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    stats: Tensor,
    grad_soft: Tensor,
    grad_hard: Tensor,
    *options: Any,
    out: Tensor,
) -> None:
    rows = RowOptions(*options)
    backend = backends.choose(rows.backend, student, teacher)
    backend.rows_backward(student, teacher, targets, stats, grad_soft, grad_hard, rows, out)


def _fake_fused(student: Tensor, teacher: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = (student, teacher, targets)
    return _empty_rows(*rows), _empty_rows(*rows), student.new_empty(student.shape)


@_operator(
    "rows_fused",
    f"Tensor student, {_LOGITS}, Tensor coef_soft, Tensor coef_hard -> (Tensor, Tensor, Tensor)",
    _fake_fused,
)
def rows_fused(
    student: Tensor, teacher: Tensor, targets: Tensor, coef_soft: Tensor, coef_hard: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """soft[N], hard[N] and the gradient of sum(coef_soft * soft + coef_hard * hard), in one visit of each row."""
    rows = RowOptions(*options)
    out = student.new_empty(student.shape)
    backend = backends.choose(rows.backend, student, teacher)
    soft, hard = backend.rows_fused(student, teacher, targets, coef_soft, coef_hard, rows, out)
    return soft, hard, out
