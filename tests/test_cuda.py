"""The CUDA backend around its kernels, which run here on the CPU (tests/cuda_host.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from support import BACKENDS, check, make_labels, make_logits

from fused_kd import fused_kd_loss, native
from fused_kd.backends import PREFERENCE, cuda
from fused_kd.backends.rows import NO_LABEL, SKIP, LogitRows, RowOptions

if "cuda" not in BACKENDS:
    pytest.skip("no CUDA library for the CPU", allow_module_level=True)

OPTIONS = RowOptions(2.0, 2.0, "forward_kl", 0.0, True, True, "cuda")

# Prints a digest of what the verbs give, on shapes with whole steps, tails, several sections, and both ways of giving
# rows to blocks.
DIGEST = """
import hashlib, sys
import torch
sys.path.insert(0, sys.argv[1])
from support import make_logits
from fused_kd import fused_kd_loss, ops
digest = hashlib.sha256()
for rows, columns, dtype in ((2, 9001, torch.bfloat16), (6, 9001, torch.float32), (5, 600, torch.float16)):
    for tau in (1.0, 2.0, 3.0):
        student, teacher = (x.to(dtype) for x in make_logits("wide", rows, columns))
        labels, ones = torch.arange(rows) * 97, torch.ones(rows)
        options = (tau, tau, "forward_kl", 0.0, True, True, "cuda")
        for x in (*ops.rows_forward(student, teacher, labels, *options),
                  *ops.rows_fused(student, teacher, labels, ones, ones, *options)):
            digest.update(x.view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_the_order_of_lanes_and_warps_does_not_matter() -> None:
    digests = set()
    for seed in range(3):
        environment = {**os.environ, "FUSED_KD_HOST_SEED": str(seed)}
        command = [sys.executable, "-c", DIGEST, os.path.dirname(__file__)]
        digests.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(digests) == 1


def test_an_error_of_cuda_is_raised_with_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = make_logits("wide", 2, 40)
    real: Any = native.load("cuda")

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return (lambda *_: 9) if name == "fkd_cuda_rows_forward" else getattr(real, name)

    monkeypatch.setattr(native, "load", lambda name: Failing())
    with pytest.raises(RuntimeError, match="fused_kd: CUDA error 9: invalid configuration argument"):
        fused_kd_loss(student, teacher, alpha=1.0, backend="cuda")


def test_more_rows_than_a_grid_has_blocks_is_an_error_not_a_wrong_result() -> None:
    one = torch.zeros(1, 1).expand(2**31, 1)
    arguments = [native.rows_of(one), native.rows_of(one), 0, native.loss_of(OPTIONS), 0, 0, 0, None, 0, None]
    library: Any = native.load("cuda")
    assert library.fkd_cuda_rows_forward(*arguments) == 9


@pytest.mark.parametrize("label", [5000, -1, 2**40, -(2**62)])
def test_a_label_out_of_range_makes_its_row_nan(label: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nobody waits to see it: nothing is read out of bounds, and the other rows are as they were."""
    monkeypatch.setattr(cuda, "check_targets", lambda *_: None)
    student, teacher = make_logits("wide", 3, 5000)
    ones, out = torch.ones(3), torch.empty_like(student)
    for targets in (torch.tensor([7, label, NO_LABEL]), torch.tensor([7, SKIP, NO_LABEL])):
        rows = LogitRows(student, teacher, targets, OPTIONS)
        soft, hard, stats = cuda.rows_forward(rows)
        cuda.rows_backward(rows, stats, ones, ones, out)
        bad = targets[1] != SKIP
        assert soft.isnan().tolist() == hard.isnan().tolist() == [False, bad, False]
        assert out[1].isnan().all() if bad else (out[1] == 0).all()
        assert out[::2].isfinite().all()
        fused_out = torch.empty_like(student)
        assert torch.equal(cuda.rows_fused(rows, ones, ones, fused_out)[0][::2], soft[::2])
        assert torch.equal(fused_out[::2], out[::2])


def test_a_vocabulary_of_more_sections_than_a_block_keeps() -> None:
    columns = 257 * 4096 + 3
    student, teacher = make_logits("wide", 5, columns)
    labels = make_labels(5, vocabulary=columns)
    check(student, teacher, labels, backend="cuda")
    alone = fused_kd_loss(student[:1], teacher[:1], labels[:1], reduction="none", backend="cuda")
    whole = fused_kd_loss(student, teacher, labels, reduction="none", backend="cuda")
    assert torch.equal(alone, whole[:1])


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_logits_too_large_for_the_fast_way(temperature: float) -> None:
    student, teacher = make_logits("wide", 3, 5000)
    student[0] += 7e4
    teacher[1] -= 2e5
    student[2, ::2] = teacher[2, ::2] = torch.finfo(torch.float32).min
    check(student, teacher, torch.tensor([1, 2, 3]), temperature=temperature, backend="cuda")
    check(student, teacher, torch.tensor([1, 2, 3]), temperature=temperature, teacher_temperature=2.5, backend="cuda")


def test_what_it_refuses() -> None:
    meta = torch.empty(1, 2, device="meta")
    assert "student_logits is on meta" in str(PREFERENCE["cuda"].refuses(meta, meta, "forward_kl"))
    wide = torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="backend='cuda' cannot be used: .*torch.float64"):
        fused_kd_loss(wide, wide, alpha=1.0, backend="cuda")


def test_a_device_without_code_for_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        def fkd_cuda_usable(self, device: int) -> int:
            return 209

        def fkd_cuda_error_text(self, code: int) -> bytes:
            return b"no kernel image is available for execution on the device"

    monkeypatch.setattr(native, "load", lambda name: Old())
    monkeypatch.setattr(native, "build_report", lambda: {"cuda": {"archs": "sm_80"}})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = cuda._device_refused.__wrapped__(0)
    assert "built for sm_80, does not run on this device, sm_75: no kernel image" in reason
    assert "FUSED_KD_CUDA_ARCHS=75" in reason
