"""What the Triton backend does around its kernels: it refuses, allocates and launches, and waits for nothing."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_kd.backends import PREFERENCE
from fused_kd.backends.rows import RowOptions
from fused_kd.backends.triton import Launch, launch_for

OPTIONS = RowOptions(2.0, 2.0, "forward_kl", 0.0, True, True, "triton")


def test_the_package_imports_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch, fused_kd
from fused_kd.backends import PREFERENCE
assert "not installed" in PREFERENCE["triton"].unavailable()
fused_kd.fused_kd_loss(torch.zeros(1, 2), torch.zeros(1, 2), alpha=1.0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_does_not_import_triton() -> None:
    code = """
import sys, torch
before = "triton" in sys.modules
import fused_kd
assert before or "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_refusals() -> None:
    backend = PREFERENCE["triton"]
    assert "meta" in str(backend.refuses(torch.empty(1, 2, device="meta"), torch.empty(1, 2, device="meta")))


@pytest.mark.parametrize("warp", [32, 64])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("columns", [1, 512, 513, 1024, 4096, 16384, 32000, 151936, 2**31 - 2**16])
def test_the_launch_table(columns: int, itemsize: int, warp: int) -> None:
    launch = launch_for(columns, itemsize, warp)
    assert launch.lanes == launch.warps * warp
    assert launch.vector * itemsize == 16
    assert launch.groups in (1, 2, 4)
    assert launch.section % (launch.groups * launch.lanes * launch.vector) == 0


def test_sections_do_not_depend_on_rows_or_alignment() -> None:
    assert launch_for(151936, 2, 32) == Launch(2, 128, 8, 4, 1, 16384)


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("columns", [1000, 40000])
def test_a_launch_allocates_its_results_and_does_nothing_else(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No .item(), no copy, no .contiguous(), no comparison: kernels are launched, and the host goes on."""
    backend: Any = PREFERENCE["triton"]
    launched: list[str] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: launched.append(self.name)

    names = ("forward", "finish", "backward")
    kernels = SimpleNamespace(**{name: Kernel(name) for name in names}, PARTS=SimpleNamespace(value=10))
    monkeypatch.setattr(backend, "_kernels", lambda: kernels)
    monkeypatch.setattr(backend, "check_targets", lambda *_: None)  # on the CPU alone it looks
    wide = torch.zeros(3, 2, 2 * columns)
    student, teacher = wide[..., :columns], wide[..., columns:]
    targets, grad = torch.zeros(6, dtype=torch.int64), torch.ones(()).expand(6)
    out = torch.empty(3, 2, columns)
    with Recorder() as recorder:
        _, _, stats = backend.rows_forward(student, teacher, targets, OPTIONS)
        backend.rows_backward(student, teacher, targets, stats, grad, grad, OPTIONS, out)
        backend.rows_backward(student, teacher, targets, stats, grad, grad, OPTIONS, student)
        backend.rows_fused(student, teacher, targets, grad, grad, OPTIONS, out)
    assert set(recorder.operators) == {"new_empty"}
    forward = ["forward"] if columns < 16384 else ["forward", "finish"]
    assert launched == [*forward, "backward", "backward", *forward, "backward"]
