"""What the Triton backend does around its kernels: it refuses, allocates and launches, and waits for nothing."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_kd import KDLossOutput, autograd, functional, fused_kd_loss
from fused_kd.backends import PREFERENCE
from fused_kd.backends.rows import LogitRows, RowOptions
from fused_kd.backends.triton import Launch, family_of, launch_for
from fused_kd.divergences import DIVERGENCES, JSD, AlphaBeta, AlphaDivergence, SkewKL, SymmetricKL, divergence_of

OPTIONS = RowOptions(2.0, 2.0, "forward_kl", 0.0, True, True, "triton")
KERNELS = ("forward", "finish", "sweep", "finish_sweep", "backward", "fused")


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
    assert "meta" in str(backend.refuses(*(torch.empty(1, 2, device="meta"),) * 2, "forward_kl"))


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
    assert launch_for(151936, 2, 32) == Launch(2, 256, 8, 8, 1, 16384)


def test_what_the_compiler_knows_of_a_divergence() -> None:
    assert family_of(SymmetricKL(1.0)) == family_of(DIVERGENCES["forward_kl"]())
    assert family_of(SymmetricKL(0.0)).family == "reverse_kl"
    assert family_of(JSD(0.3)).family == "jensen_shannon"
    assert family_of(SkewKL()).family == "mixture"
    assert family_of(AlphaDivergence(0.3)).family == "alpha"
    assert family_of(AlphaBeta(0.5, 0.75)).family == "alpha_beta"
    # A parameter that is annealed compiles nothing again, but where the careful formulas begin.
    of_jsd = {family_of(JSD(beta))._replace(numbers=()) for beta in (0.4, 0.5, 0.6, 0.7)}
    assert len(of_jsd) == 1
    assert [family_of(JSD(beta)).careful for beta in (0.5, 0.1, 0.9)] == [False, True, True]
    assert [family_of(AlphaDivergence(alpha)).careful for alpha in (0.5, 0.1, 0.9)] == [False, True, True]


class Watched(RuntimeError):
    """Something that a GPU would have to wait for, or a copy of the logits."""


class Watch(TorchDispatchMode):
    """Refuses what reads a tensor on the host, and counts new tensors as large as the logits."""

    WAITS = ("_local_scalar_dense", "item", "equal", "nonzero", "is_nonzero", "masked_select")

    def __init__(self, large: int) -> None:
        super().__init__()
        self.large = large
        self.allocated: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        target = (kwargs or {}).get("device")
        if name in self.WAITS or (name == "_to_copy" and target is not None and torch.device(target).type == "cpu"):
            raise Watched(name)
        results = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        for result in results if isinstance(results, (tuple, list)) else (results,):
            new = isinstance(result, torch.Tensor) and result.untyped_storage()._cdata not in given
            if new and result.untyped_storage().nbytes() // result.element_size() >= self.large:
                self.allocated.append(name)
        return results


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The Triton backend with meta tensors in the GPU's place: its kernels are only named, in the order of launches."""
    backend: Any = PREFERENCE["triton"]
    names: list[str] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: names.append(self.name)

    kernels = {name: Kernel(name) for name in KERNELS}
    monkeypatch.setattr(backend, "_kernels", lambda: SimpleNamespace(**kernels, PARTS=SimpleNamespace(value=9)))
    monkeypatch.setattr(backend, "_warp", lambda device: 32)
    monkeypatch.setattr(backend, "_multiprocessors", lambda device: 8)
    monkeypatch.setattr(backend, "refuses", lambda *_: None)
    for module in (functional, autograd):
        monkeypatch.setattr(module, "plain", lambda *_: True)  # the mode that watches would prevent it
    return names


def meta_logits(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "logit_mse"])
@pytest.mark.parametrize("columns", [1000, 40000])
def test_a_launch_allocates_its_results_and_does_nothing_else(
    columns: int, divergence: str, launched: list[str]
) -> None:
    backend = PREFERENCE["triton"]
    wide = meta_logits(3, 2, 2 * columns)
    student, teacher = wide[..., :columns], wide[..., columns:]
    targets, grad = torch.zeros(6, dtype=torch.int64, device="meta"), torch.ones((), device="meta").expand(6)
    out = meta_logits(3, 2, columns)
    many = torch.zeros(10, dtype=torch.int64, device="meta")
    rows, rows_out = meta_logits(10, columns), meta_logits(10, columns)
    options = OPTIONS._replace(divergence=divergence, parameters=DIVERGENCES[divergence]().parameters)
    few, enough = LogitRows(student, teacher, targets, options), LogitRows(rows, rows, many, options)
    with Watch(columns) as watch:
        _, _, stats = backend.rows_forward(few)
        backend.rows_backward(few, stats, grad, grad, out)
        backend.rows_backward(few, stats, grad, grad, student)
        backend.rows_fused(few, grad, grad, out)  # too few rows for one program each
        backend.rows_fused(enough, grad[:1].expand(10), grad[:1].expand(10), rows_out)
    assert watch.allocated == []
    forward = ["forward"]
    if columns > 16384:  # several sections
        forward += ["finish"] if divergence in ("forward_kl", "reverse_kl") else ["finish", "sweep", "finish_sweep"]
    assert launched == [*forward, "backward", "backward", *forward, "backward", "fused"]


LOSSES: list[dict[str, Any]] = [
    {},
    {"shift": True},
    {"weights": True, "soft_on_ignored": True, "temperature": 3.0},
    {"weights": True, "num_items": True},
    {"num_items": 7.0, "return_parts": True},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "batchmean", "divergence": "cross_entropy"},
    {"divergence": "jsd"},
    {"reduction": "none", "teacher_temperature": 1.0},
    {"alpha": 1.0, "labels": None},
    {"alpha": 0.0},
    {"vocab_mismatch": "truncate", "teacher_columns": 900},
    {"teacher_dtype": torch.float16},
    {"strided": True},
    {"inplace": True},
]


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_the_loss_waits_for_nothing_and_copies_nothing(options: dict[str, Any], launched: list[str]) -> None:
    options = dict(options)
    batch, positions, columns = 3, 5, 1000
    base = meta_logits(batch, positions, columns, dtype=torch.bfloat16).requires_grad_()
    student = base * 1
    teacher = meta_logits(
        batch, positions, options.pop("teacher_columns", columns), dtype=options.pop("teacher_dtype", torch.bfloat16)
    )
    labels = torch.zeros(batch, positions, dtype=torch.int64, device="meta")
    if options.pop("strided", False):
        student, teacher, labels = student[:, :-1], teacher[:, 1:], labels[:, 1:]
    if options.pop("weights", False):
        options["weights"] = torch.empty(batch, positions, device="meta")
    if options.get("num_items") is True:
        options["num_items"] = torch.empty((), device="meta")
    labels = options.pop("labels", labels)
    inplace = options.get("inplace", False)
    family_of(divergence_of(options.get("divergence", "forward_kl")))  # fits polynomials, once and on the CPU
    with Watch(positions * columns) as watch:
        loss = fused_kd_loss(student, teacher, labels, backend="triton", **options)
        loss = loss.loss if isinstance(loss, KDLossOutput) else loss
        assert watch.allocated == []
        (gradient,) = torch.autograd.grad(loss, student, torch.ones_like(loss))
    assert watch.allocated == ([] if inplace else ["empty"])
    assert gradient.shape == student.shape
    assert launched == ["forward", "backward"]


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: torch.equal(x, x),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.to(device="cpu", dtype=torch.float64),
    ],
)
def test_the_watch_refuses_what_waits(act: Any) -> None:
    with pytest.raises((Watched, NotImplementedError)), Watch(10):  # PyTorch itself refuses some of it for meta tensors
        act(meta_logits(4, 5))


@pytest.mark.parametrize(
    "act", [lambda x: x.t().contiguous(), lambda x: x.clone(), lambda x: x.float(), lambda x: x * 2]
)
def test_the_watch_sees_copies(act: Any) -> None:
    logits = meta_logits(4, 5, dtype=torch.bfloat16)
    with Watch(20) as watch:
        act(logits)
    assert len(watch.allocated) == 1
