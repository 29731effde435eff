"""The native CPU kernels (csrc/cpu): vectorised loops, OpenMP over rows, torch.get_num_threads() threads."""

import torch
from torch import Tensor

from fused_kd import native
from fused_kd.backends.rows import STATS, LogitRows, bad_target

NAME = "cpu"
DESCRIPTION = "compiled for the CPU: vectorised, threaded; float32, bfloat16, float16"


def unavailable() -> str | None:
    library = native.load("cpu")
    return library if isinstance(library, str) else None


def refuses(student: Tensor, teacher: Tensor, divergence: str) -> str | None:
    if student.device.type != "cpu":
        return f"it takes tensors on the CPU, and student_logits is on {student.device}"
    return native.refuses(student, teacher)


def rows_forward(rows: LogitRows) -> tuple[Tensor, Tensor, Tensor]:
    soft, hard, stats = _vector(rows), _vector(rows), _vector(rows, STATS)
    _call("fkd_rows_forward", rows, soft, hard, stats)
    return soft, hard, stats


def rows_terms(rows: LogitRows, stats: Tensor) -> Tensor:
    sums = _vector(rows, native.TERMS)
    _call("fkd_rows_terms", rows, stats, sums)
    return sums


def rows_backward(rows: LogitRows, stats: Tensor, grad_soft: Tensor, grad_hard: Tensor, out: Tensor) -> None:
    _call("fkd_rows_backward", rows, stats, grad_soft, grad_hard, out=out)


def rows_fused(rows: LogitRows, coef_soft: Tensor, coef_hard: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    soft, hard = _vector(rows), _vector(rows)
    _call("fkd_rows_fused", rows, coef_soft, coef_hard, soft, hard, out=out)
    return soft, hard


def _vector(rows: LogitRows, *shape: int) -> Tensor:
    # (Whatever PyTorch's default device and dtype are.)
    return rows.targets.new_empty((rows.number, *shape), dtype=torch.float32)


def _call(verb: str, rows: LogitRows, *rest: Tensor, out: Tensor | None = None) -> None:
    arguments, _alive = native.arguments(rows, *rest)
    if rows.number == 0:
        return
    if out is not None:
        arguments.append(native.rows_of(out))
    result = getattr(native.load("cpu"), verb)(*arguments, torch.get_num_threads())
    if result == native.OUT_OF_MEMORY:
        raise MemoryError("fused_kd: no memory for one row's scratch in each thread")
    if result != native.DONE:
        raise bad_target(rows, result)
