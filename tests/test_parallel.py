"""A vocabulary that is cut over ranks: the loss and the gradient are those of one process with all of it."""

from __future__ import annotations

import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    BACKENDS,
    INF,
    LOSS_RELATIVE,
    assert_gradient,
    assert_loss,
    before,
    make_labels,
    make_logits,
    make_normal,
    parts,
)
from test_divergences import KINDS, gradient_error_bound
from torch import Tensor

from fused_kd import FusedKDLoss, FusedLinearKDLoss, SparseTeacher, fused_kd_loss, fused_linear_kd_loss
from fused_kd.divergences import (
    JSD,
    AlphaBeta,
    AlphaDivergence,
    CrossEntropy,
    Divergence,
    ForwardKL,
    LogitMSE,
    ReverseKL,
    SkewKL,
    SymmetricKL,
    TotalVariation,
)
from fused_kd.ensemble import ENSEMBLES
from fused_kd.parallel.slices import has_second_visit
from fused_kd.reference import kd_loss, soft_term

if not torch.distributed.is_available():
    pytest.skip("PyTorch was built without torch.distributed", allow_module_level=True)

WIDTHS = [(300, 211), (1, 600, 37, 129)]


def on_ranks(number: int, work: Callable[[int, Any], Any]) -> list[Any]:
    """work(rank, group) of each rank, a thread with a gloo group of its own."""
    store = torch.distributed.HashStore()

    def run(rank: int) -> Any:
        torch.set_num_threads(1)
        group = torch.distributed.ProcessGroup(store, rank, number)
        gloo = torch.distributed.ProcessGroupGloo(store, rank, number, timedelta(seconds=60))
        group._register_backend(torch.device("cpu"), torch.distributed.ProcessGroup.BackendType.GLOO, gloo)
        return work(rank, group)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(run, range(number)))


def cut(teacher: Any, widths: tuple[int, ...], rank: int) -> Any:
    """Of each kind of teacher what a rank has."""
    if isinstance(teacher, SparseTeacher):
        return teacher
    return teacher.split(widths, -1)[rank] if isinstance(teacher, Tensor) else [cut(x, widths, rank) for x in teacher]


def exactly(teacher: Any) -> Any:
    if isinstance(teacher, SparseTeacher):  # (the reference makes its log-probabilities float64)
        return teacher
    return teacher.double() if isinstance(teacher, Tensor) else [x.double() for x in teacher]


def check(
    student: Tensor,
    teacher: Any,
    labels: Tensor | None,
    widths: tuple[int, ...],
    *,
    relative: float = LOSS_RELATIVE,
    absolute: Tensor | None = None,
    seen: Callable[[Tensor, Tensor], None] = assert_gradient,
    **options: Any,
) -> None:
    """Cut into slices of these widths, against the reference on the whole."""

    def work(rank: int, group: Any) -> tuple[Tensor, Tensor]:
        logits = student.split(widths, -1)[rank].detach().requires_grad_()
        computed = logits * 1  # inplace=True wants no leaf
        loss = parts(fused_kd_loss(computed, cut(teacher, widths, rank), labels, process_group=group, **options))
        loss.backward(upstream.to(loss.dtype))
        assert logits.grad is not None
        assert logits.grad.dtype == student.dtype
        return loss.detach(), logits.grad

    exact = student.detach().double().requires_grad_()
    given = {name: x for name, x in options.items() if name not in ("backend", "return_parts", "inplace", "entropies")}
    expected = kd_loss(exact, exactly(teacher), labels, **given)
    upstream = torch.linspace(0.5, 1.5, expected.numel(), dtype=torch.float64).reshape(expected.shape)
    (exact_gradient,) = torch.autograd.grad(expected, exact, upstream)
    losses, gradients = zip(*on_ranks(len(widths), work), strict=True)
    for loss in losses:
        assert torch.equal(loss.nan_to_num(-1), losses[0].nan_to_num(-1))
    if absolute is None:
        assert_loss(losses[0], expected.detach(), relative)
    else:
        assert ((losses[0] - expected).abs() <= absolute).all()
    seen(torch.cat(gradients, -1), exact_gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("widths", WIDTHS, ids=len)
@pytest.mark.parametrize("divergence", ["forward_kl", "cross_entropy"])
@pytest.mark.parametrize("kind", ["wide", "peaked", "close", "big", "masked"])
def test_the_whole_vocabulary(
    kind: str, divergence: str, widths: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    if dtype == torch.float64 and backend != "torch":
        pytest.skip("the torch backend's")
    student, teacher = (x.to(dtype) for x in make_logits(kind, 11, sum(widths)))
    labels = make_labels(11, vocabulary=sum(widths))
    check(student, teacher, labels, widths, divergence=divergence, backend=backend, temperature=2.0)
    how = {"temperature": 3.0, "teacher_temperature": 2.0, "reduction": "none"}
    check(student, teacher, labels, widths, divergence=divergence, backend=backend, **how)


@pytest.mark.parametrize("divergence", [x for x in KINDS if type(x) not in (ForwardKL, CrossEntropy)], ids=repr)
@pytest.mark.parametrize("kind", ["wide", "peaked", "close", "big", "masked"])
def test_every_divergence(kind: str, divergence: Divergence, backend: str) -> None:
    student, teacher = make_logits(kind, 5, sum(WIDTHS[1]))
    if kind == "masked":  # by both: where the teacher alone is -inf, reverse KL is
        student = student.masked_fill(teacher == -INF, -INF)
    check_soft_term(student, teacher, divergence, 3.0, WIDTHS[1], backend)


@pytest.mark.parametrize(
    "divergence",
    [SymmetricKL(), JSD(), SkewKL(), TotalVariation(), AlphaDivergence(0.1), AlphaBeta(2.0, 3.0)],
    ids=repr,
)
@pytest.mark.parametrize(("sigma", "tau"), [(0.01, 1.0), (0.01, 100.0), (300.0, 1.0)])
def test_families_of_a_larger_vocabulary(sigma: float, tau: float, divergence: Divergence, backend: str) -> None:
    noise, teacher = make_normal(1, 40000, seed=3)
    student, widths = teacher * 3 + sigma * noise, (9000, 9001, 12999, 9000)
    check_soft_term(student, teacher * 3, divergence, tau, widths, backend)


def check_soft_term(
    student: Tensor, teacher: Tensor, divergence: Divergence, tau: float, widths: tuple[int, ...], backend: str
) -> None:
    """Of rows [N, V], and its gradient without tau^2, within the bounds of one process."""
    if divergence.family is not None and not has_second_visit(backend):
        pytest.skip("it has no second visit by itself")
    expected = soft_term(
        student.double(), teacher.double(), temperature=tau, teacher_temperature=tau, divergence=divergence
    )

    def seen(gradient: Tensor, exact: Tensor) -> None:
        assert (gradient.isnan() == exact.isnan()).all()
        bound = gradient_error_bound(student, exact, divergence, tau, expected)
        assert ((gradient.double() - exact).norm(dim=-1) <= bound).all()

    how: dict[str, Any] = {"temperature": tau, "alpha": 1.0, "t2_scaling": False, "reduction": "none"}
    check(student, teacher, None, widths, divergence=divergence, backend=backend, seen=seen, **how)


@pytest.mark.parametrize("sigma", [0.05, 0.01])
@pytest.mark.parametrize("tau", [1.0, 20.0, 100.0])
def test_a_nearly_converged_student(tau: float, sigma: float, backend: str) -> None:
    """The ranks' masses differ by even less than the columns do."""
    noise, teacher = make_normal(2, 40000, seed=3)
    student = teacher * 3 + sigma * noise
    how: dict[str, Any] = {"alpha": 1.0, "temperature": tau}
    for divergence in ("forward_kl", "reverse_kl"):
        check(student, teacher * 3, None, (9000, 9001, 12999, 9000), divergence=divergence, backend=backend, **how)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.5, "hard_weight": 1.0, "reduction": "sum"},
        {"alpha": 0.3, "shift": True, "reduction": "none", "inplace": True},
        {"alpha": 0.3, "soft_on_ignored": True, "reduction": "batchmean"},
        {"alpha": 0.9, "teacher_temperature": 3.5, "weights": torch.arange(10.0).reshape(2, 5)},
        {"alpha": 0.0, "ignore_index": 7},
        {"label_smoothing": 0.1, "soft_on_ignored": True},
        {"label_smoothing": 1.0, "alpha": 0.0, "student_softcap": 20.0, "reduction": "none"},
        {"alpha": 1.0, "num_items": 7, "return_parts": True},
        {"student_softcap": 20.0, "teacher_logit_scale": 0.7},
        {"student_softcap": 20.0, "divergence": JSD(0.3)},
        {
            "teacher_temperature": 3.5,
            "soft_on_ignored": True,
            "label_smoothing": 0.1,
            "divergence": AlphaBeta(0.2, 0.7),
        },
    ],
    ids=",".join,
)
def test_with_the_options(options: dict[str, Any], backend: str) -> None:
    if "divergence" in options and not has_second_visit(backend):
        pytest.skip("it has no second visit by itself")
    student, teacher = make_logits("wide", 2, 5, 300)
    labels = make_labels(2, 5, vocabulary=300, ignored=0.4)
    assert (labels == -100).any()
    labels = labels.masked_fill(labels == -100, options.get("ignore_index", -100))
    check(student, teacher, labels, (64, 64, 100, 72), backend=backend, **options)


@pytest.mark.parametrize("divergence", [ForwardKL(), CrossEntropy(), ReverseKL(), JSD(), LogitMSE()], ids=repr)
def test_slices_of_nothing(divergence: Divergence, backend: str) -> None:
    """A padded vocabulary, whose last rank has only padding; and rows of which a rank has nothing of one of the two."""
    if isinstance(divergence, JSD) and not has_second_visit(backend):
        pytest.skip("it has no second visit by itself")
    widths = (40, 50, 30)
    student, teacher = (x.clone() for x in make_logits("wide", 6, 120))
    student[:, 80:] = teacher[:, 80:] = -INF
    teacher[1, :40] = -INF
    student[2, :40] = -INF
    student[3, 40:80], teacher[3, 40:80] = -INF, -INF
    student[4, :], teacher[5, :] = torch.nan, -INF
    labels = torch.tensor([3, 70, 70, 5, 9, 11])

    def seen(gradient: Tensor, exact: Tensor) -> None:
        bad = torch.zeros_like(exact, dtype=torch.bool)
        bad[4], bad[5] = True, not isinstance(divergence, LogitMSE)
        bad[1] = isinstance(divergence, ReverseKL)
        assert torch.equal(gradient.isnan(), bad)
        kept = torch.where(bad | exact.isnan(), 0.0, exact)  # (the reference has NaN where both are -inf)
        assert_gradient(torch.where(bad | exact.isnan(), 0.0, gradient), kept)

    check(student, teacher, labels, widths, divergence=divergence, backend=backend, reduction="none", seen=seen)


def test_label_smoothing_over_columns_that_are_ruled_out(backend: str) -> None:
    """It is +inf, in whichever slice they are; the label's own too."""
    student, teacher = (x.clone() for x in make_logits("wide", 4, 90))
    student[0, 3] = student[1, 80] = -INF
    student[2, :30] = teacher[2, :30] = -INF
    labels = torch.tensor([3, 70, 40, 5])

    def work(rank: int, group: Any) -> Tensor:
        logits = (x.split((30, 60), -1)[rank] for x in (student, teacher))
        how: dict[str, Any] = {"label_smoothing": 0.1, "reduction": "none", "process_group": group, "backend": backend}
        return parts(fused_kd_loss(*logits, labels, **how))

    for loss in on_ranks(2, work):
        assert (loss[:3] == INF).all()
        assert loss[3].isfinite()


@pytest.mark.parametrize("cap", [{}, {"teacher_softcap": 9.0}], ids=str)
def test_entropies(cap: dict[str, Any], backend: str) -> None:
    student, teacher = make_logits("wide", 2, 5, 300)
    labels = make_labels(2, 5, vocabulary=300)
    how: dict[str, Any] = {"entropies": True, "return_parts": True, "teacher_temperature": 3.0, "backend": backend}
    expected = fused_kd_loss(student.double(), teacher.double(), labels, **{**how, "backend": "torch"}, **cap)

    def work(rank: int, group: Any) -> Any:
        logits = (x.split((1, 199, 100), -1)[rank] for x in (student, teacher))
        return fused_kd_loss(*logits, labels, process_group=group, **how, **cap)

    for found in on_ranks(3, work):
        for ours, right in zip(found, expected, strict=True):
            assert_loss(ours, right)


def test_a_nan_in_one_slice(backend: str) -> None:
    student, teacher = (x.clone() for x in make_logits("wide", 4, 90))
    student[0, :30] = student[1, 80] = teacher[2, 30:] = torch.nan
    labels = torch.tensor([3, 70, 40, 5])

    def work(rank: int, group: Any) -> Tensor:
        logits = (x.split((30, 60), -1)[rank] for x in (student, teacher))
        return parts(fused_kd_loss(*logits, labels, reduction="none", process_group=group, backend=backend))

    for loss in on_ranks(2, work):
        assert loss.isnan().tolist() == [True, True, True, False]


def test_rows_that_do_not_count_are_not_read(backend: str) -> None:
    student, teacher = (x.clone() for x in make_logits("wide", 4, 90))
    student[1], teacher[1, :30] = torch.nan, INF
    labels = torch.tensor([3, -100, 31, 89])
    check(student, teacher, labels, (30, 60), backend=backend)


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (2, 0)], ids=str)
@pytest.mark.parametrize("given", ["logits", "sparse", *ENSEMBLES])
def test_one_position_and_none(given: str, shape: tuple[int, ...]) -> None:
    student, teacher = make_logits("wide", *shape, 30)
    labels = make_labels(*shape, vocabulary=30, ignored=0)
    teachers: Any = SparseTeacher.from_logits(teacher, 3) if given == "sparse" else teacher
    how: dict[str, Any] = {"divergence": "jsd", "student_softcap": 20.0}
    if given in ENSEMBLES:
        teachers, how["ensemble"] = [teacher, student], given
    check(student, teachers, labels, (10, 20), **how)
    check(student, teachers, labels, (10, 20), return_parts=True, entropies=True, **how)


def test_a_label_out_of_range(backend: str) -> None:
    student, teacher = make_logits("wide", 3, 90)

    def work(rank: int, group: Any) -> None:
        with pytest.raises(IndexError, match=r"row 2 has the label 90, which is not in \[0, 90\)"):
            fused_kd_loss(
                student.split(30, -1)[rank],
                teacher.split(30, -1)[rank],
                torch.tensor([0, 89, 90]),
                process_group=group,
                backend=backend,
            )

    on_ranks(3, work)


def test_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes a row, from each rank, and once a call 16 bytes: the width of its slice, and what it is called with."""
    student, teacher = make_logits("wide", 100, 90)
    labels = make_labels(100, vocabulary=90)

    sent: dict[int, list[int]] = defaultdict(list)

    def counted(every: Any, own: Tensor, group: Any) -> Any:
        sent[threading.get_ident()].append(own.nbytes)
        return all_gather(every, own, group=group)

    all_gather = torch.distributed.all_gather
    monkeypatch.setattr(torch.distributed, "all_gather", counted)

    def bytes_of(teacher: Any = teacher, **options: Any) -> list[int]:
        sent.clear()

        def work(rank: int, group: Any) -> list[int]:
            logits = student.split(45, -1)[rank].detach().requires_grad_()
            loss = fused_kd_loss(logits, cut(teacher, (45, 45), rank), labels, process_group=group, **options)
            parts(loss).backward()
            return sent[threading.get_ident()]

        first, second = on_ranks(2, work)
        assert first == second
        return first

    assert bytes_of() == [16, 3600]
    assert bytes_of(alpha=1.0) == [16, 2400]
    assert bytes_of(alpha=0.0) == [16, 1600]
    assert bytes_of(alpha=1.0, divergence="reverse_kl") == [16, 2800]
    assert bytes_of(alpha=1.0, divergence="logit_mse") == [16, 1200]
    assert bytes_of(label_smoothing=0.1) == [16, 4400]
    assert bytes_of(alpha=1.0, divergence="jsd") == [16, 2400, 1600]
    top = SparseTeacher.from_logits(teacher, 7)
    assert bytes_of(top, alpha=1.0) == bytes_of(top, alpha=1.0, divergence="jsd") == [16, 1200 + 7 * 400]
    assert bytes_of(top) == [16, 1200 + 7 * 400 + 1600]
    assert bytes_of(top, alpha=0.0) == [16, 1600]
    several = [teacher, student, teacher]
    assert bytes_of(several, alpha=1.0) == [16, 3 * 800, 4800]
    assert bytes_of(several, alpha=1.0, ensemble="geometric") == [16, 4800]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recompute": True, "soft_on_ignored": True},
        {"reduction": "none", "divergence": "reverse_kl"},
        {"divergence": "jsd", "alpha": 1.0},
        {"label_smoothing": 0.2},
        {"student_softcap": 5.0, "weights": torch.arange(14.0)},
    ],
    ids=",".join,
)
def test_from_hidden_states(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Of which all ranks have the whole gradient, and of the head their slice's."""
    widths, rows, width = (1, 60, 37, 22), 14, 8
    generator = torch.Generator().manual_seed(5)
    x, w, b, y, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((rows, width), (sum(widths), width), (sum(widths),), (rows, width), (sum(widths), width))
    )
    labels = make_labels(rows, vocabulary=sum(widths))

    call = {name: value for name, value in options.items() if name == "weights"}
    made = {name: value for name, value in options.items() if name != "weights"}

    def work(rank: int, group: Any) -> tuple[Tensor, ...]:
        def own(x: Tensor) -> Tensor:
            return x.split(widths)[rank].clone().requires_grad_()

        hidden, weight, bias = x.clone().requires_grad_(), own(w), own(b)
        loss_fn = FusedLinearKDLoss(process_group=group, chunk_rows=4, **made)
        loss = parts(loss_fn(hidden, weight, y, own(v), labels, student_bias=bias, **call))
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias), torch.ones_like(loss) * 3)

    how = {name: value for name, value in options.items() if name != "recompute"}
    found = on_ranks(4, work)
    exact = [z.double().requires_grad_() for z in (x, w, b)]
    expected = kd_loss(exact[0] @ exact[1].T + exact[2], y.double() @ v.double().T, labels, **how)
    expected_gradients = torch.autograd.grad(expected, exact, torch.ones_like(expected) * 3)
    one = [z.clone().requires_grad_() for z in (x, w, b)]
    loss = parts(fused_linear_kd_loss(*one[:2], y, v, labels, student_bias=one[2], **options))
    of_one = torch.autograd.grad(loss, one, torch.ones_like(loss) * 3)

    losses, hidden, weight, bias = zip(*found, strict=True)
    for each in (losses, hidden):
        assert all(torch.equal(z, each[0]) for z in each)
    assert_loss(losses[0], expected.detach(), 1e-10 if dtype == torch.float64 else LOSS_RELATIVE)
    for ours, single, right in zip(
        (hidden[0], torch.cat(weight), torch.cat(bias)), of_one, expected_gradients, strict=True
    ):
        error, of_single = ((z.double() - right).norm() for z in (ours, single))
        assert error <= 1.5 * of_single + (1e-12 if dtype == torch.float64 else 1e-6) * right.norm()


def _of_a_process(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=4)
    pair = torch.distributed.new_group([2, 3])
    assert pair is not None
    _compare(4, rank, torch.distributed.group.WORLD)
    if rank >= 2:
        _compare(2, rank - 2, pair)
    torch.distributed.destroy_process_group()


def _compare(number: int, rank: int, group: Any) -> None:
    widths = WIDTHS[number == 4]
    student, teacher = make_logits("close", 3, 5, sum(widths))
    labels = make_labels(3, 5, vocabulary=sum(widths))
    for dtype in (torch.float32, torch.bfloat16):
        exact = student.to(dtype).double().requires_grad_()
        expected = kd_loss(exact, teacher.double(), labels, temperature=4.0)
        expected.backward()
        mine = student.split(widths, -1)[rank].to(dtype).requires_grad_()
        loss = FusedKDLoss(temperature=4.0, process_group=group)(mine, teacher.split(widths, -1)[rank], labels)
        loss.backward()
        found: list[Any] = [None] * number
        torch.distributed.all_gather_object(found, (loss.detach(), mine.grad), group=group)
        losses, gradients = zip(*found, strict=True)
        assert all(torch.equal(x, losses[0]) for x in losses)
        assert_loss(losses[0], expected.detach())
        assert exact.grad is not None
        assert_gradient(torch.cat(gradients, -1), exact.grad)
        if number == 4:
            _compare_dtensors(student.to(dtype), teacher, labels, expected.detach(), exact.grad)


def _compare_dtensors(student: Tensor, teacher: Tensor, labels: Tensor, expected: Tensor, exact: Tensor) -> None:
    # (PyTorch may be built without.)
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor  # noqa: PLC0415

    mesh = init_device_mesh("cpu", (4,))
    s, t = (distribute_tensor(x, mesh, [Shard(2)]) for x in (student, teacher))
    several = [t, distribute_tensor(student.roll(1, 0), mesh, [Shard(2)])]
    exact_several = [teacher.double(), student.double().roll(1, 0)]
    s.requires_grad_()
    loss = parts(fused_kd_loss(s, t, distribute_tensor(labels, mesh, [Replicate()]), temperature=4.0))
    loss.backward()
    assert type(loss) is Tensor
    assert_loss(loss.detach(), expected)
    assert isinstance(s.grad, DTensor)
    if not before(torch.__version__, 2, 14):  # PyTorch 2.11 was seen to give it whole, and right
        assert s.grad.placements == s.placements
    assert_gradient(s.grad.full_tensor(), exact)
    top = SparseTeacher.from_logits(teacher, 9, 4.0)
    whole = SparseTeacher(*(distribute_tensor(x, mesh, [Replicate()]) for x in (top.ids, top.log_probs)))
    for given in (top, whole):
        assert_loss(
            parts(fused_kd_loss(s, given, labels, temperature=4.0)),
            kd_loss(student.double(), top, labels, temperature=4.0),
        )
    right = kd_loss(student.double(), exact_several, labels, temperature=4.0)
    assert_loss(parts(fused_kd_loss(s, several, labels, temperature=4.0)).detach(), right)
    with pytest.raises(ValueError, match=r"teacher_logits\[1\] must be a DTensor with the placements"):
        fused_kd_loss(s, [t, teacher], labels)
    with pytest.raises(ValueError, match="must be sharded on the vocabulary"):
        fused_kd_loss(distribute_tensor(student, mesh, [Shard(0)]), t, labels)
    with pytest.raises(ValueError, match="teacher_logits must be a DTensor with the placements"):
        fused_kd_loss(s, teacher, labels)


def test_processes(tmp_path: Path) -> None:
    """Four of them, and two of the four."""
    torch.multiprocessing.spawn(_of_a_process, (os.fspath(tmp_path / "store"),), nprocs=4)


def test_under_compile() -> None:
    """It runs outside of the graph."""
    student, teacher = make_logits("wide", 4, 60)
    labels = make_labels(4, vocabulary=60)

    def work(_: int, group: Any) -> tuple[Tensor, Tensor]:
        def loss(x: Tensor, y: Tensor) -> Any:
            return fused_kd_loss(x, y, labels, process_group=group)

        return loss(student, teacher), torch.compile(loss, backend="eager")(student, teacher)

    ((eager, compiled),) = on_ranks(1, work)
    assert torch.equal(eager, compiled)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"process_group": "tp"}, TypeError, "process_group must be a torch.distributed.ProcessGroup, got str"),
        ({"vocab_mismatch": "truncate"}, ValueError, 'vocab_mismatch="truncate" has no meaning with process_group'),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_it_refuses(options: dict[str, Any], error: type[Exception], words: str) -> None:
    student, teacher = make_logits("wide", 4, 60)
    labels = make_labels(4, vocabulary=60)

    def work(_: int, group: Any) -> None:
        with pytest.raises(error, match=re.escape(words)):
            fused_kd_loss(student, teacher, labels, **{"process_group": group, **options})

    on_ranks(1, work)


@pytest.mark.parametrize(
    "options", [{"temperature": (2.0, 3.0)}, {"divergence": ("forward_kl", "jsd")}, {"alpha": (1.0, 0.0)}], ids=str
)
def test_ranks_that_are_called_otherwise(options: dict[str, tuple[Any, Any]]) -> None:
    """All say so, and nobody waits."""
    student, teacher = make_logits("wide", 4, 60)
    labels = make_labels(4, vocabulary=60)

    def work(rank: int, group: Any) -> None:
        own = {name: values[rank] for name, values in options.items()}
        slices = (x.split(30, -1)[rank] for x in (student, teacher))
        with pytest.raises(ValueError, match=f"the same options.* were not; rank {rank} was with KDOptions"):
            fused_kd_loss(*slices, labels, process_group=group, **own)

    on_ranks(2, work)


def test_rows_that_differ() -> None:
    student, teacher = make_logits("wide", 4, 60)

    def work(rank: int, group: Any) -> None:
        slices = (x.split(30, -1)[rank][rank:] for x in (student, teacher))
        with pytest.raises(ValueError, match="rows and dtypes, but they were not"):
            fused_kd_loss(*slices, alpha=1.0, process_group=group)

    on_ranks(2, work)


def test_slices_that_are_not_cut_alike() -> None:
    """Nobody is sent to vocab_mismatch, which a slice does not have."""
    student, teacher = make_logits("wide", 4, 60)

    def work(_: int, group: Any) -> None:
        with pytest.raises(ValueError, match="each rank must have the same columns of both$"):
            fused_kd_loss(student, teacher[:, :-1], alpha=1.0, process_group=group)

    on_ranks(1, work)


@pytest.mark.skipif("cuda" not in BACKENDS, reason="the CUDA library takes no tensors here")
def test_a_backend_without_a_second_visit() -> None:
    student, teacher = make_logits("wide", 4, 60)

    def work(_: int, group: Any) -> None:
        with pytest.raises(ValueError, match="backend='cuda' has no part of divergence 'jsd' for a slice"):
            fused_kd_loss(student, teacher, alpha=1.0, divergence="jsd", backend="cuda", process_group=group)

    on_ranks(1, work)
