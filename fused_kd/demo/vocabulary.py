"""One step of the loss, forward and backward, at a language model's vocabulary: time and memory, fused and eager."""

import mmap
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fused_kd import backends, gradient_memory
from fused_kd.demo import Track
from fused_kd.demo.eager import eager_kd_loss
from fused_kd.loss import FusedKDLoss
from fused_kd.options import KDOptions

VOCABULARY = 151936
_REPEATS = 5
_PERIOD = 0.0005  # seconds; filling a tensor of this size takes many times as long
_RESIDENT, _PAGE = Path("/proc/self/statm"), mmap.PAGESIZE  # the second number there counts pages; Linux


@dataclass(frozen=True)
class Cost:
    seconds: float
    memory: int | None  # bytes above the inputs, the gradient included; None where it cannot be measured


@dataclass(frozen=True)
class Measured:
    rows: int
    backend: str
    fused: Cost
    eager: Cost
    softmax_seconds: float  # of the student's logits: a yardstick
    loss_difference: float  # of fused and eager, relative
    gradient_difference: float

    @property
    def logits_bytes(self) -> int:
        return self.rows * VOCABULARY * torch.float32.itemsize


def run(rows: int, seed: int, track: Track) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(rows, VOCABULARY, generator=generator).mul_(3)
    student = torch.randn(rows, VOCABULARY, generator=generator).add_(teacher)
    labels = torch.randint(VOCABULARY, (rows,), generator=generator)
    module = FusedKDLoss()

    def fused() -> tuple[Tensor, Tensor]:
        leaf = student.detach().requires_grad_()
        return _step(module(leaf, teacher, labels), leaf)

    def eager() -> tuple[Tensor, Tensor]:
        leaf = student.detach().requires_grad_()
        options = {"temperature": KDOptions.temperature, "alpha": KDOptions.alpha}
        return _step(eager_kd_loss(leaf, teacher, labels, **options), leaf)

    def softmax() -> Tensor:
        return student.softmax(-1)

    # These first calls also pay for what a process allocates once.
    (fused_loss, fused_gradient), (eager_loss, eager_gradient) = fused(), eager()
    seconds = _seconds([fused, eager, softmax], track)
    return Measured(
        rows=rows,
        backend=backends.choose("auto", student, teacher).NAME,
        fused=Cost(seconds[0], _peak(fused)),
        eager=Cost(seconds[1], _peak(eager)),
        softmax_seconds=seconds[2],
        loss_difference=float((fused_loss - eager_loss).abs() / eager_loss),
        gradient_difference=float((fused_gradient - eager_gradient).norm() / eager_gradient.norm()),
    )


def _step(loss: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the student's gradient."""
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach(), gradient


def _seconds(works: list[Callable[[], object]], track: Track) -> list[float]:
    """The median seconds of each, measured in turns: a disturbance of the machine meets all of them."""
    turns: list[list[float]] = [[] for _ in works]
    for _ in track("loss at a large vocabulary", _REPEATS):
        for work, seconds in zip(works, turns, strict=True):
            begin = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begin)
    return [statistics.median(seconds) for seconds in turns]


def _peak(work: Callable[[], object]) -> int | None:
    """How far the memory of this process rises meanwhile, sampled by a thread: it sees native code's memory too."""
    if not _RESIDENT.exists():
        return None
    gradient_memory.release()  # it would be counted as there before
    done = threading.Event()
    begin = _resident()
    peak = begin

    def sample() -> None:
        nonlocal peak
        while not done.wait(_PERIOD):
            peak = max(peak, _resident())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return peak - begin


def _resident() -> int:
    return int(_RESIDENT.read_text().split()[1]) * _PAGE
