"""A vocabulary that is cut over ranks, and several teachers that are cut alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import INF, LOSS_RELATIVE, assert_loss, gradient_bound, make_labels, make_logits, make_normal, parts
from test_divergences import ONE_OF_EACH, gradient_error_bound
from test_ensembles import make_teachers
from test_parallel import check, cut, on_ranks
from torch import Tensor

from fused_kd import FusedLinearKDLoss, ensemble, fused_kd_loss
from fused_kd.divergences import JSD, Divergence, ForwardKL, LogitMSE, ReverseKL
from fused_kd.ensemble import ENSEMBLES
from fused_kd.parallel.slices import has_second_visit
from fused_kd.reference import kd_loss

WIDTHS = (1, 400, 37, 262)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which ranks with slices of other widths have another number."""
    monkeypatch.setattr(ensemble, "_PIECE", 600)


def check_rows(
    student: Tensor,
    teachers: list[Tensor],
    divergence: Divergence,
    kind: str,
    tau: float,
    widths: tuple[int, ...],
    **options: Any,
) -> None:
    """The soft term of rows [N, V], and its gradient without tau^2, within the bounds of one process."""
    how: dict[str, Any] = {"temperature": tau, "alpha": 1.0, "t2_scaling": False, "reduction": "none", **options}
    how |= {"divergence": divergence, "ensemble": kind}
    given = {name: x for name, x in how.items() if name != "backend"}
    expected = kd_loss(student.double(), [x.double() for x in teachers], **given)

    def seen(gradient: Tensor, exact: Tensor) -> None:  # (each row's upstream gradient is another)
        scale = torch.linspace(0.5, 1.5, len(student), dtype=torch.float64).unsqueeze(1)
        bound = gradient_error_bound(student, exact / scale, divergence, tau, expected) + 1e-14
        if student.dtype != torch.float32:
            bound = torch.maximum(
                bound, 1.1 * ((exact.to(student.dtype).double() - exact) / scale).norm(dim=-1) + 1e-14
            )
        assert (((gradient.double() - exact) / scale).norm(dim=-1) <= bound).all()

    check(student, teachers, None, widths, seen=seen, **how)


@pytest.mark.parametrize("divergence", [*ONE_OF_EACH, LogitMSE(centred=False)], ids=repr)
@pytest.mark.parametrize("kind", ENSEMBLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_divergence(dtype: torch.dtype, kind: str, divergence: Divergence, small_pieces: None) -> None:
    for logits in ("wide", "peaked", "close", "big") if dtype == torch.float32 else ("wide",):
        student, teachers = make_teachers(logits, 4, sum(WIDTHS), dtype=dtype)
        check_rows(student, teachers, divergence, kind, 3.0, WIDTHS, teacher_weights=[0.5, 3, 1.0])


@pytest.mark.parametrize("kind", ENSEMBLES)
def test_the_native_kernels_take_the_pieces_of_a_student_of_16_bits(kind: str, backend: str) -> None:
    for divergence in (ForwardKL(), ReverseKL(), LogitMSE(), JSD()):
        if divergence.family is not None and not has_second_visit(backend):
            continue
        student, teachers = make_teachers("wide", 5, sum(WIDTHS), dtype=torch.bfloat16)
        check_rows(student, teachers, divergence, kind, 2.0, WIDTHS, backend=backend)


@pytest.mark.parametrize(("sigma", "tau"), [(0.01, 1.0), (0.01, 100.0)])
@pytest.mark.parametrize("kind", ENSEMBLES)
def test_a_nearly_converged_student(kind: str, sigma: float, tau: float) -> None:
    (first, noise), (third, _) = make_normal(1, 40000, seed=3), make_normal(1, 40000, seed=4)
    teachers = [first * 3, first * 3 + third + 40]
    mean = ensemble.combined(teachers, torch.full((1, 2), 0.5), kind, tau, torch.float32, level=False)
    student, widths = mean + sigma * noise, (9000, 9001, 12999, 9000)
    check(student, teachers, None, widths, ensemble=kind, temperature=tau, alpha=1.0)
    for divergence in (ReverseKL(), JSD()):
        check_rows(student, teachers, divergence, kind, tau, widths)


@pytest.mark.parametrize("kind", ENSEMBLES)
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.7, "temperature": 3.0, "teacher_weights": torch.tensor([1.0, 2.0, 0.0])},
        {"alpha": 0.5, "hard_weight": 1.0, "label_smoothing": 0.1, "reduction": "sum"},
        {"alpha": 0.3, "shift": True, "reduction": "none", "inplace": True, "divergence": "jsd"},
        {"alpha": 0.3, "soft_on_ignored": True, "reduction": "batchmean"},
        {"alpha": 0.9, "teacher_temperature": 3.5, "weights": torch.arange(10.0).reshape(2, 5)},
        {"alpha": 0.0},
        {"student_softcap": 20.0, "teacher_softcap": 15.0, "teacher_logit_scale": 0.7},
        {"teacher_softcap": 15.0, "divergence": "jsd", "return_parts": True},
    ],
    ids=",".join,
)
def test_with_the_options(options: dict[str, Any], kind: str, small_pieces: None) -> None:
    student, teachers = make_teachers("wide", 2, 5, 300)
    labels = make_labels(2, 5, vocabulary=300)

    def seen(gradient: Tensor, exact: Tensor) -> None:
        assert (gradient.double() - exact).norm() <= gradient_bound(exact, torch.float32) * 2.5

    check(student, teachers, labels, (64, 64, 100, 72), ensemble=kind, seen=seen, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ENSEMBLES)
def test_slices_of_nothing(kind: str, dtype: torch.dtype, backend: str) -> None:
    """A padded vocabulary; rows of which one teacher, or the student, has nothing in a slice; a teacher of weight 0."""
    if dtype == torch.float32 and backend != "torch":
        pytest.skip("the torch backend's")
    student, teacher = (x.clone() for x in make_logits("wide", 6, 120))
    second = make_logits("peaked", 6, 120)[1]
    student[:, 80:] = teacher[:, 80:] = second[:, 80:] = -INF
    teacher[1, :40] = -INF
    student[2, :40] = -INF
    student[3, 40:80] = teacher[3, 40:80] = second[3, 40:80] = -INF
    teacher[4, 50] = torch.nan
    labels = torch.tensor([3, 70, 70, 5, 9, 11])

    def seen(gradient: Tensor, exact: Tensor) -> None:
        bad = torch.zeros_like(exact, dtype=torch.bool)
        bad[4] = True
        assert torch.equal(gradient.isnan(), bad)
        kept = torch.where(bad | exact.isnan(), 0.0, exact)  # (the reference has NaN where both are -inf)
        gradient = torch.where(bad | exact.isnan(), 0.0, gradient)
        assert (gradient.double() - kept).norm() <= gradient_bound(kept, dtype)

    teachers, weights = [teacher, second, torch.full_like(teacher, torch.nan)], [1.0, 2.0, 0.0]
    how: dict[str, Any] = {"ensemble": kind, "backend": backend, "reduction": "none", "teacher_weights": weights}
    check(student.to(dtype), [x.to(dtype) for x in teachers], labels, (40, 50, 30), seen=seen, **how)


@pytest.mark.parametrize("cap", [{}, {"teacher_softcap": 9.0}], ids=str)
@pytest.mark.parametrize("kind", ENSEMBLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_entropies(dtype: torch.dtype, kind: str, cap: dict[str, Any], small_pieces: None) -> None:
    student, teachers = make_teachers("wide", 2, 5, 300, dtype=dtype)
    labels, widths = make_labels(2, 5, vocabulary=300), (1, 199, 100)
    how: dict[str, Any] = {"entropies": True, "return_parts": True, "teacher_temperature": 3.0, "ensemble": kind, **cap}
    expected = fused_kd_loss(student.double(), [x.double() for x in teachers], labels, **how)

    def work(rank: int, group: Any) -> Any:
        own = cut(student, widths, rank), cut(teachers, widths, rank)
        return fused_kd_loss(*own, labels, process_group=group, **how)

    for found in on_ranks(3, work):
        for ours, right in zip(found, expected, strict=True):
            assert_loss(ours, right)


@pytest.mark.parametrize(
    "options",
    [{}, {"ensemble": "geometric", "recompute": True}, {"divergence": "jsd", "entropies": True, "return_parts": True}],
    ids=",".join,
)
def test_from_hidden_states(options: dict[str, Any]) -> None:
    widths, rows, width = (1, 60, 37, 22), 14, 8
    generator = torch.Generator().manual_seed(5)
    x, w, *others = (
        torch.randn(shape, generator=generator) for shape in ((rows, width), (120, width)) * 3
    )  # the student's, and those of two teachers
    labels = make_labels(rows, vocabulary=120)

    def work(rank: int, group: Any) -> tuple[Any, ...]:
        hidden, weight, v, u = (z.clone() for z in (x, *(z.split(widths)[rank] for z in (w, *others[1::2]))))
        hidden.requires_grad_(), weight.requires_grad_()
        loss_fn = FusedLinearKDLoss(process_group=group, chunk_rows=4, **options)
        found = loss_fn(hidden, weight, others[::2], [v, u], labels, teacher_weights=[0.3, 0.7])
        return found, *torch.autograd.grad(parts(found), (hidden, weight))

    found, hidden, weight = zip(*on_ranks(4, work), strict=True)
    assert all(torch.equal(z, hidden[0]) for z in hidden)
    assert all(torch.equal(parts(z), parts(found[0])) for z in found)
    exact = [z.double().requires_grad_() for z in (x, w)]
    logits = [h.double() @ v.double().T for h, v in zip(others[::2], others[1::2], strict=True)]
    how = {name: value for name, value in options.items() if name in ("ensemble", "divergence")}
    expected = kd_loss(exact[0] @ exact[1].T, logits, labels, teacher_weights=[0.3, 0.7], **how)
    assert_loss(parts(found[0]).detach(), expected.detach(), LOSS_RELATIVE)
    for ours, right in zip((hidden[0], torch.cat(weight)), torch.autograd.grad(expected, exact), strict=True):
        assert (ours.double() - right).norm() <= 5e-6 * right.norm()
