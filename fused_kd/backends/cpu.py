"""The native CPU kernels (csrc/cpu): vectorised loops, OpenMP over rows, torch.get_num_threads() threads."""

import torch
from torch import Tensor

from fused_kd import native
from fused_kd.backends.rows import STATS, RowOptions, bad_target, vocabulary

NAME = "cpu"
DESCRIPTION = "compiled for the CPU: vectorised, threaded; float32, bfloat16, float16"


def unavailable() -> str | None:
    library = native.load("cpu")
    return library if isinstance(library, str) else None


def refuses(student: Tensor, teacher: Tensor, divergence: str) -> str | None:
    if student.device.type != "cpu":
        return f"it takes tensors on the CPU, and student_logits is on {student.device}"
    return native.refuses(student, teacher, divergence)


def rows_forward(
    student: Tensor, teacher: Tensor, targets: Tensor, options: RowOptions
) -> tuple[Tensor, Tensor, Tensor]:
    rows = targets.numel()
    soft, hard = _vector(targets, rows), _vector(targets, rows)
    stats = _vector(targets, rows, STATS)
    _call("fkd_rows_forward", student, teacher, targets, options, soft, hard, stats)
    return soft, hard, stats


def rows_backward(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    stats: Tensor,
    grad_soft: Tensor,
    grad_hard: Tensor,
    options: RowOptions,
    out: Tensor,
) -> None:
    _call("fkd_rows_backward", student, teacher, targets, options, stats, grad_soft, grad_hard, out=out)


def rows_fused(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    coef_soft: Tensor,
    coef_hard: Tensor,
    options: RowOptions,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    soft, hard = _vector(targets, targets.numel()), _vector(targets, targets.numel())
    _call("fkd_rows_fused", student, teacher, targets, options, coef_soft, coef_hard, soft, hard, out=out)
    return soft, hard


def _vector(targets: Tensor, *shape: int) -> Tensor:
    return targets.new_empty(shape, dtype=torch.float32)  # whatever PyTorch's default device and dtype are


def _call(
    verb: str,
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    options: RowOptions,
    *rest: Tensor,
    out: Tensor | None = None,
) -> None:
    arguments, _alive = native.arguments(student, teacher, targets, options, *rest)
    if targets.numel() == 0:
        return
    if out is not None:
        arguments.append(native.rows_of(out))
    result = getattr(native.load("cpu"), verb)(*arguments, torch.get_num_threads())
    if result == native.OUT_OF_MEMORY:
        raise MemoryError("fused_kd: no memory for one row's scratch in each thread")
    if result != native.DONE:
        raise bad_target(result, int(targets[result]), vocabulary(student, teacher))
