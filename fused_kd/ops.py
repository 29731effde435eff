"""The row operations as PyTorch operators, so that torch.compile sees each as a whole.

The backend is chosen when an operator runs. Vectors with one number a row are float32, or float64 where one of the
logits is. What a fake kernel allocates is what the real one does.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fused_kd import backends
from fused_kd.backends.rows import STATS, RowOptions

# RowOptions, as operators take it.
_OPTIONS = (
    "float temperature, float teacher_temperature, str divergence, float label_smoothing, "
    "bool soft, bool hard, str backend"
)
_LOGITS = "Tensor teacher, Tensor targets"


def _operator(name: str, signature: str, mutates: Iterable[str] = ()) -> Callable[[Any], Any]:
    arguments, result = signature.split(" -> ")
    return torch.library.custom_op(
        f"fused_kd::{name}", mutates_args=mutates, schema=f"({arguments}, {_OPTIONS}) -> {result}"
    )


def row_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """The dtype of vectors with one number a row."""
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


@_operator("rows_forward", f"Tensor student, {_LOGITS} -> (Tensor, Tensor, Tensor)")
def rows_forward(student: Tensor, teacher: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """soft[N], hard[N], and stats[N, STATS]: what the gradient needs of each row."""
    rows = RowOptions(*options)
    return backends.choose(rows.backend, student, teacher).rows_forward(student, teacher, targets, rows)


@rows_forward.register_fake
def _(student: Tensor, teacher: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = targets.shape[0], row_dtype(student, teacher)
    return (
        student.new_empty(rows, dtype=dtype),
        student.new_empty(rows, dtype=dtype),
        student.new_empty(rows, STATS, dtype=dtype),
    )


@_operator(
    "rows_backward", f"Tensor student, {_LOGITS}, Tensor stats, Tensor grad_soft, Tensor grad_hard -> Tensor"
)
def rows_backward(student: Tensor, teacher: Tensor, targets: Tensor, *rest: Any) -> Tensor:
    """The gradient of sum(grad_soft * soft + grad_hard * hard), contiguous, in the student's dtype and shape."""
    out = student.new_empty(student.shape)
    _backward(student, teacher, targets, *rest, out=out)
    return out


@rows_backward.register_fake
def _(student: Tensor, teacher: Tensor, targets: Tensor, *rest: Any) -> Tensor:
    return student.new_empty(student.shape)


@_operator(
    "rows_backward_",
    f"Tensor(a!) student, {_LOGITS}, Tensor stats, Tensor grad_soft, Tensor grad_hard -> ()",
    mutates=("student",),
)
def rows_backward_(student: Tensor, teacher: Tensor, targets: Tensor, *rest: Any) -> None:
    """The same, written over the student's logits."""
    _backward(student, teacher, targets, *rest, out=student)


@rows_backward_.register_fake
def _(student: Tensor, teacher: Tensor, targets: Tensor, *rest: Any) -> None:
    return None


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


@_operator(
    "rows_fused", f"Tensor student, {_LOGITS}, Tensor coef_soft, Tensor coef_hard -> (Tensor, Tensor, Tensor)"
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


@rows_fused.register_fake
def _(
    student: Tensor, teacher: Tensor, targets: Tensor, coef_soft: Tensor, coef_hard: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = targets.shape[0], row_dtype(student, teacher)
    return (
        student.new_empty(rows, dtype=dtype),
        student.new_empty(rows, dtype=dtype),
        student.new_empty(student.shape),
    )
