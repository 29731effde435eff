"""How time is measured, for `pytest benchmarks` and `gpu_report.py` alike.

On a GPU a round lasts from one event on its stream to another. Before it the cache is filled with other data, and the
GPU is kept busy while the host queues the round: kernels are measured, and not Python or what a cache still holds.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

WARMUP = 5
_CACHE_BYTES = 256 << 20  # several times the L2 cache of any GPU
_HEAD_START = 2_000_000  # clocks: a millisecond or more, longer than any contender's Python


class Times(NamedTuple):
    """Of one round, in seconds. `host`: until the call returns, which on a GPU is before its work is done."""

    median: float
    fastest: float
    host: float


class Instant:
    """A place in the GPU's queue. The difference of two is in seconds, and waits for the later one."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Instant) -> float:
        self.event.synchronize()
        return float(earlier.event.elapsed_time(self.event)) / 1e3


def clock(device: str) -> Callable[[], Any]:
    """What to call for the time; of what it gives, only differences mean something."""
    return Instant if device == "cuda" else time.perf_counter


def before_round(device: str) -> Callable[[], None]:
    """What to call before each round."""
    return _gpu_made_ready if device == "cuda" else _nothing


def rounds(elements: int) -> int:
    """How many, for logits of this many elements, or for products of this many multiplications."""
    return 5 if elements > 10**10 else 25 if elements > 10**7 else 200


def measure(function: Callable[[], object], device: str, count: int, warmup: int = WARMUP) -> Times:
    now, make_ready = clock(device), before_round(device)
    seconds, host = [], []
    for _ in range(warmup + count):
        make_ready()
        called = time.perf_counter()
        begin = now()
        function()
        end = now()
        host.append(time.perf_counter() - called)
        seconds.append(end - begin)
    return Times(statistics.median(seconds[warmup:]), min(seconds[warmup:]), statistics.median(host[warmup:]))


def _nothing() -> None: ...


def _gpu_made_ready() -> None:
    _other_data().max()  # read, not written: lines that differ from memory would be written back within the round
    torch.cuda._sleep(_HEAD_START)


@functools.cache
def _other_data() -> torch.Tensor:
    return torch.zeros(_CACHE_BYTES // 4, device="cuda")
