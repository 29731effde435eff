"""The native CPU kernels (csrc/cpu): vectorised loops, OpenMP over rows, torch.get_num_threads() threads."""

import ctypes

import torch
from torch import Tensor

from fused_kd import native
from fused_kd.backends.rows import STATS, RowOptions, bad_target, vocabulary

NAME = "cpu"
DESCRIPTION = "compiled for the CPU: vectorised, threaded; float32, bfloat16, float16"


def unavailable() -> str | None:
    library = native.load("cpu")
    return library if isinstance(library, str) else None


def refuses(student: Tensor, teacher: Tensor) -> str | None:
    if student.device.type != "cpu":
        return f"it takes tensors on the CPU, and student_logits is on {student.device}"
    return native.refuses(student, teacher)


def rows_forward(
    student: Tensor, teacher: Tensor, targets: Tensor, options: RowOptions
) -> tuple[Tensor, Tensor, Tensor]:
    rows = targets.numel()
    soft, hard = torch.empty(rows), torch.empty(rows)
    stats = torch.empty(rows, STATS)
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
    gradient = ctypes.byref(native.rows_of(out))
    _call("fkd_rows_backward", student, teacher, targets, options, stats, grad_soft, grad_hard, gradient)


def rows_fused(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    coef_soft: Tensor,
    coef_hard: Tensor,
    options: RowOptions,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    soft, hard = torch.empty(targets.numel()), torch.empty(targets.numel())
    gradient = ctypes.byref(native.rows_of(out))
    _call("fkd_rows_fused", student, teacher, targets, options, coef_soft, coef_hard, soft, hard, gradient)
    return soft, hard


def _call(verb: str, student: Tensor, teacher: Tensor, targets: Tensor, options: RowOptions, *rest: object) -> None:
    positions = student.shape[:-1].numel()
    if not targets.numel() == positions == teacher.shape[:-1].numel():
        raise ValueError(f"each of the student's {positions} rows needs a teacher's row and a target")
    if positions == 0:
        return
    _check_vectors(targets, *rest)
    # Vectors of one number a row: O(N), so a strided one (an expanded gradient) may be laid out anew.
    vectors = [x.contiguous() if isinstance(x, Tensor) else x for x in (targets, *rest)]
    first, *others = (x.data_ptr() if isinstance(x, Tensor) else x for x in vectors)
    result = getattr(native.load("cpu"), verb)(
        ctypes.byref(native.rows_of(student)),
        ctypes.byref(native.rows_of(teacher)),
        first,
        ctypes.byref(native.loss_of(options)),
        *others,
        torch.get_num_threads(),
    )
    if result == native.OUT_OF_MEMORY:
        raise MemoryError("fused_kd: no memory for one row's scratch in each thread")
    if result != native.DONE:
        raise bad_target(result, int(targets[result]), vocabulary(student, teacher))


def _check_vectors(targets: Tensor, *rest: object) -> None:
    """The operators can be called by anybody, and the library believes what it is told."""
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}")
    for vector in rest:
        if isinstance(vector, Tensor) and (vector.dtype != torch.float32 or len(vector) != len(targets)):
            raise ValueError(
                f"each row needs its own float32 number: got {vector.dtype} {tuple(vector.shape)} "
                f"for {len(targets)} targets"
            )
