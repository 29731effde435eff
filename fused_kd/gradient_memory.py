"""The memory of large gradients on the CPU: that of one which was freed serves the next.

The system clears every page that it hands out, which takes as long as computing the gradient that is then written
there. So when a large gradient is freed, its pages are not unmapped but given back by MADV_FREE: the system takes them
whenever it runs short of memory, and until then the next gradient finds them as they are. At most one such mapping is
kept. Smaller gradients come from PyTorch: below 32 MiB the C library keeps freed memory by itself.
"""

import ctypes
import math
import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

_LARGE = 32 << 20
_AVAILABLE = hasattr(mmap, "MADV_FREE") and hasattr(mmap, "MAP_ANONYMOUS")

_spare: list[mmap.mmap] = []


def empty_gradient(student: Tensor) -> Tensor:
    """A contiguous tensor with the student's shape, dtype and device, and no particular values."""
    return empty(student.shape, student.dtype, student.device)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    # A profiler of memory knows what PyTorch allocates: so where one watches, PyTorch does.
    if device.type != "cpu" or size < _LARGE or not _AVAILABLE or torch._C._autograd._profiler_enabled():
        return torch.empty(shape, dtype=dtype, device=device)
    block = None
    with suppress(IndexError):
        block = _spare.pop()
    if block is None or len(block) < size:
        try:
            block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:  # PyTorch says better what is missing
            return torch.empty(shape, dtype=dtype, device=device)
    memory = (ctypes.c_char * size).from_buffer(block)
    weakref.finalize(memory, _give_back, block).atexit = False
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()  # holds `memory` until it is freed
    return torch.empty(0, dtype=dtype, device=device).set_(storage).resize_(shape)


def release() -> None:
    """Unmaps what is kept for the next gradient."""
    _spare.clear()


def _give_back(block: mmap.mmap) -> None:
    if not _spare:
        with suppress(OSError):  # a system that does not know MADV_FREE gets its pages back
            block.madvise(mmap.MADV_FREE)
            _spare.append(block)
            del _spare[1:]  # two that were freed at once
