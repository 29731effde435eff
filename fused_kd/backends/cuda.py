"""The CUDA C++ kernels (csrc/cuda): NVIDIA GPUs, without Triton. Queued on PyTorch's current stream; nothing waits."""

import functools
from typing import Any

import torch
from torch import Tensor

from fused_kd import native
from fused_kd.backends.rows import STATS, LogitRows, check_targets

NAME = "cuda"
DESCRIPTION = "compiled for NVIDIA GPUs, from CUDA C++: float32, bfloat16, float16"


def unavailable() -> str | None:
    library = native.load("cuda")
    return library if isinstance(library, str) else None


def refuses(student: Tensor, teacher: Tensor, divergence: str) -> str | None:
    device = student.device
    expected = "cpu" if _on_host() else "cuda"
    if device.type != expected or (expected == "cuda" and torch.version.hip):
        where = f"the CPU, as {native.CUDA_LIBRARY} names a library for tests" if _on_host() else "an NVIDIA GPU"
        return f"it takes tensors on {where}, and student_logits is on {device}"
    reason = native.refuses(student, teacher)
    if reason is None and device.type == "cuda":
        reason = _device_refused(device.index)
    return reason


def rows_forward(rows: LogitRows) -> tuple[Tensor, Tensor, Tensor]:
    check_targets(rows)
    soft, hard, stats = _vector(rows), _vector(rows), _vector(rows, STATS)
    _call("fkd_cuda_rows_forward", rows, soft, hard, stats, scratch=native.FORWARD)
    return soft, hard, stats


def rows_backward(rows: LogitRows, stats: Tensor, grad_soft: Tensor, grad_hard: Tensor, out: Tensor) -> None:
    _call("fkd_cuda_rows_backward", rows, stats, grad_soft, grad_hard, out=out)


def rows_fused(rows: LogitRows, coef_soft: Tensor, coef_hard: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    check_targets(rows)
    soft, hard = _vector(rows), _vector(rows)
    _call("fkd_cuda_rows_fused", rows, coef_soft, coef_hard, soft, hard, out=out, scratch=native.FUSED)
    return soft, hard


def _vector(rows: LogitRows, *shape: int) -> Tensor:
    return rows.student.new_empty((rows.number, *shape), dtype=torch.float32)


def _call(verb: str, rows: LogitRows, *rest: Tensor, out: Tensor | None = None, scratch: int | None = None) -> None:
    # What dies with this function is memory of the stream's: PyTorch gives it to none but what is queued later.
    arguments, alive = native.arguments(rows, *rest)
    if rows.number == 0:
        return
    library: Any = native.load("cuda")
    device = rows.student.device.index or 0
    if out is not None:
        arguments.append(native.rows_of(out))
    if scratch is not None:
        size = library.fkd_cuda_scratch(arguments[0], arguments[1], arguments[3], scratch, device)
        alive.append(rows.student.new_empty(size, dtype=torch.uint8))
        arguments.append(alive[-1].data_ptr() if size else None)
    stream = None if _on_host() else torch.cuda.current_stream(rows.student.device).cuda_stream
    _raise_for(getattr(library, verb)(*arguments, device, stream))


def _raise_for(code: int) -> None:
    if code:
        raise RuntimeError(f"fused_kd: CUDA error {code}: {_text(code)}")


def _text(code: int) -> str:
    library: Any = native.load("cuda")
    return str(library.fkd_cuda_error_text(code).decode())


@functools.cache
def _on_host() -> bool:
    library: Any = native.load("cuda")
    return bool(library.fkd_cuda_on_host())


@functools.cache
def _device_refused(device: int) -> str | None:
    """A kernel needs code for this device in the library, or PTX that the driver can compile for it."""
    library: Any = native.load("cuda")
    code = library.fkd_cuda_usable(device)
    if code == 0:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    built = native.build_report()["cuda"].get("archs", "unknown architectures")
    return (
        f"its library, built for {built}, does not run on this device, sm_{major}{minor}: {_text(code)} "
        f"(CUDA error {code}); reinstall the package with FUSED_KD_CUDA_ARCHS={major}{minor}"
    )
