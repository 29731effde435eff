"""A vocabulary that is cut over ranks, and a sparse teacher with ids of all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import INF, LOSS_RELATIVE, assert_loss, gradient_bound, make_labels, make_logits, make_normal, parts
from test_parallel import check, on_ranks
from test_sparse import CASES, check_gradient, exactly, make_teacher, size_of_terms
from torch import Tensor

from fused_kd import FusedLinearKDLoss, SparseTeacher, fused_kd_loss
from fused_kd.divergences import JSD, Divergence, ForwardKL, ReverseKL, SymmetricKL, TotalVariation
from fused_kd.reference import kd_loss
from fused_kd.sparse import MISSING

WIDTHS = (1, 200, 37, 162)


def infinite(missing: str, divergence: Divergence) -> bool:
    """ "renormalize" puts p = 0 on the other columns, where q is not."""
    reverse = isinstance(divergence, (ReverseKL, SymmetricKL)) and divergence != SymmetricKL(1.0)
    return missing == "renormalize" and reverse


def check_rows(
    student: Tensor, teacher: SparseTeacher, divergence: Divergence, tau: float, widths: tuple[int, ...], **options: Any
) -> None:
    """The soft term of rows [N, V], and its gradient without tau^2, within the bounds of one process."""
    how: dict[str, Any] = {"temperature": tau, "alpha": 1.0, "t2_scaling": False, "reduction": "none"}
    expected = kd_loss(student.double(), teacher, divergence=divergence, **how)
    absolute = None
    if teacher.missing == "truncate":  # a sum of terms that may cancel: right to what they are right to
        absolute = 1e-5 * size_of_terms(student, teacher, divergence, tau)

    def seen(gradient: Tensor, exact: Tensor) -> None:  # (each row's upstream gradient is another)
        scale = torch.linspace(0.5, 1.5, len(student), dtype=torch.float64).unsqueeze(1)
        check_gradient(student, gradient / scale, exact / scale, divergence, tau, expected)

    check(student, teacher, None, widths, divergence=divergence, seen=seen, absolute=absolute, **how, **options)


@pytest.mark.parametrize(("missing", "divergence"), CASES)
def test_every_way_and_divergence(missing: str, divergence: Divergence, backend: str) -> None:
    if infinite(missing, divergence):
        return
    for kind, k in (("wide", 1), ("wide", 17), ("peaked", 17), ("close", 17), ("big", 17)):
        student, teacher = make_logits(kind, 5, sum(WIDTHS))
        check_rows(student, make_teacher(teacher, k, 3.0, missing), divergence, 3.0, WIDTHS, backend=backend)


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JSD(), TotalVariation()], ids=repr)
@pytest.mark.parametrize(("sigma", "tau"), [(0.05, 1.0), (0.05, 20.0), (0.01, 100.0)])
def test_a_nearly_converged_student(sigma: float, tau: float, divergence: Divergence, backend: str) -> None:
    """The ranks' parts of log R have to be as exact as the whole is."""
    noise, teacher = make_normal(1, 151936, seed=3)
    student, widths = teacher * 3 + sigma * noise, (40000, 40001, 51935, 20000)
    top = SparseTeacher.from_logits((teacher * 3).double(), 64, tau)
    exact = torch.tensor([exactly(student, top, divergence, tau)], dtype=torch.float64)
    check_rows(student, top, divergence, tau, widths, backend=backend)

    def work(rank: int, group: Any) -> Any:
        how: dict[str, Any] = {"temperature": tau, "alpha": 1.0, "t2_scaling": False, "divergence": divergence}
        return fused_kd_loss(student.split(widths, -1)[rank], top, process_group=group, backend=backend, **how)

    for loss in on_ranks(4, work):
        assert_loss(loss.reshape(1), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("missing", MISSING)
def test_dtypes(missing: str, dtype: torch.dtype, backend: str) -> None:
    if dtype == torch.float64 and backend != "torch":
        pytest.skip("the torch backend's")
    student, teacher = make_logits("wide", 5, sum(WIDTHS))
    labels, top = make_labels(5, vocabulary=sum(WIDTHS)), make_teacher(teacher, 9, 2.0, missing)
    check(student.to(dtype), top, labels, WIDTHS, backend=backend)


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.5, "hard_weight": 1.0, "label_smoothing": 0.1, "reduction": "sum"},
        {"alpha": 0.3, "shift": True, "reduction": "none", "inplace": True},
        {"alpha": 0.3, "soft_on_ignored": True, "reduction": "batchmean"},
        {"alpha": 0.9, "weights": torch.arange(10.0).reshape(2, 5), "inplace": True, "label_smoothing": 0.2},
        {"alpha": 1.0, "num_items": 7, "return_parts": True, "divergence": "cross_entropy"},
        {"alpha": 0.0, "label_smoothing": 0.1},
        {"student_softcap": 20.0, "label_smoothing": 0.1},
        {"student_logit_scale": 1.5},
    ],
    ids=",".join,
)
def test_with_the_options(options: dict[str, Any], missing: str, backend: str) -> None:
    student, teacher = make_logits("wide", 2, 5, 100)
    top = make_teacher(teacher, 9, 2.0, missing)
    labels = make_labels(2, 5, vocabulary=100, ignored=0.4)
    labels[0, 1], labels[1, 2] = top.ids[0, 1, 0], top.ids[1, 2, 0]  # of the ids
    labels[0, 2], labels[1, 3] = 20, 55  # the first column of a slice, which has the gradient of labels elsewhere
    assert (labels == -100).any()

    def seen(gradient: Tensor, exact: Tensor) -> None:
        assert (gradient.double() - exact).norm() <= gradient_bound(exact, torch.float32) * 2.5

    check(student, top, labels, (20, 35, 1, 44), backend=backend, seen=seen, **options)


@pytest.mark.parametrize("missing", MISSING)
def test_where_the_ids_lie(missing: Any, backend: str) -> None:
    """In one slice, at the ends of slices, all columns of one; a row of none, and columns that are ruled out."""
    student, teacher = (x.clone() for x in make_logits("wide", 6, 30))
    student[4, :10] = student[5, 10:20] = -INF
    ids = torch.tensor(
        [[1, 2, 3, 4], [9, 10, 19, 20], [20, 29, -1, 0], [10, -1, 25, 3], [11, 12, 13, -1], [3, 4, 5, 6]]
    )
    log_probs = teacher.log_softmax(-1).gather(-1, ids.clamp(min=0))
    labels = torch.tensor([1, 10, 15, 29, 22, 0])

    def seen(gradient: Tensor, exact: Tensor) -> None:
        kept = exact.nan_to_num()  # (PyTorch's logsumexp has no gradient where all columns are -inf)
        assert not gradient.isnan().any()
        assert (gradient.double() - kept).norm() <= gradient_bound(kept, torch.float32)

    top = SparseTeacher(ids, log_probs, missing)
    for widths in ((10, 10, 10), (1, 9, 10, 10)):
        check(student, top, labels, widths, backend=backend, reduction="none", seen=seen)
    check(student, SparseTeacher(ids.int(), log_probs.bfloat16(), missing), labels, (11, 19), backend=backend)


def test_all_columns_are_the_dense_loss() -> None:
    student, teacher = (x.double() for x in make_logits("wide", 3, 30))
    labels = make_labels(3, vocabulary=30)
    for missing in MISSING:
        top = SparseTeacher.from_logits(teacher, 30, 2.0, missing)  # type: ignore[arg-type]

        def work(rank: int, group: Any, top: SparseTeacher = top) -> tuple[Tensor, Tensor]:
            leaf = student.split((10, 20), -1)[rank].clone().requires_grad_()
            loss = parts(fused_kd_loss(leaf, top, labels, process_group=group))
            return loss.detach(), torch.autograd.grad(loss, leaf)[0]

        losses, gradients = zip(*on_ranks(2, work), strict=True)
        exact = student.clone().requires_grad_()
        expected = kd_loss(exact, teacher, labels)
        torch.testing.assert_close(losses[0], expected.detach(), rtol=1e-10, atol=1e-13)
        right = torch.autograd.grad(expected, exact)[0]
        torch.testing.assert_close(torch.cat(gradients, -1), right, rtol=1e-10, atol=1e-13)


def test_a_nan_is_its_row_alone(backend: str) -> None:
    student, teacher = (x.clone() for x in make_logits("wide", 5, 30))
    top = SparseTeacher.from_logits(teacher, 3)
    student[0, top.ids[0, 0]] = student[1, 0] = torch.nan
    student[2, 29] = INF
    top.log_probs[3, 1] = torch.nan

    def work(rank: int, group: Any) -> tuple[Tensor, Tensor]:
        leaf = student.split((12, 18), -1)[rank].clone().requires_grad_()
        how: dict[str, Any] = {"alpha": 1.0, "reduction": "none", "backend": backend, "process_group": group}
        loss = parts(fused_kd_loss(leaf, top, **how))
        return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

    for loss, gradient in on_ranks(2, work):
        for found in (loss, gradient.isnan().all(-1), gradient.isnan().any(-1)):
            assert (found.isnan() if found.is_floating_point() else found).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("cap", [{}, {"student_softcap": 9.0}], ids=str)
def test_entropies(cap: dict[str, Any], missing: str, backend: str) -> None:
    student, teacher = make_logits("wide", 2, 5, 300)
    labels, top = make_labels(2, 5, vocabulary=300), make_teacher(teacher, 9, 2.0, missing)
    how: dict[str, Any] = {"entropies": True, "return_parts": True}
    expected = fused_kd_loss(student.double(), top, labels, **how, **cap)

    def work(rank: int, group: Any) -> Any:
        own = student.split((1, 199, 100), -1)[rank]
        return fused_kd_loss(own, top, labels, process_group=group, backend=backend, **how, **cap)

    for found in on_ranks(3, work):
        for ours, right in zip(found, expected, strict=True):
            assert_loss(ours, right)


@pytest.mark.parametrize(
    ("ids", "log_probs", "error", "words"),
    [
        ([[1, 2], [30, 3]], [[-1.0, -2.0]] * 2, IndexError, r"row 1 has an id in slot 0 that is not in \[0, 30\)"),
        ([[1, 2], [29, 29]], [[-1.0, -2.0]] * 2, IndexError, "row 1 has the id 29 twice"),
        ([[1, 2], [3, 4]], [[-1.0, -2.0], [-0.1, -0.2]], ValueError, "the probabilities of row 1 sum to 1.72"),
    ],
    ids=["range", "twice", "sum"],
)
def test_rows_that_cannot_be(ids: Any, log_probs: Any, error: type[Exception], words: str) -> None:
    top, student = SparseTeacher(torch.tensor(ids), torch.tensor(log_probs)), torch.zeros(2, 10)

    def work(_: int, group: Any) -> None:
        with pytest.raises(error, match=words):
            fused_kd_loss(student, top, alpha=1.0, process_group=group)

    on_ranks(3, work)


@pytest.mark.parametrize(
    "options",
    [{}, {"recompute": True, "missing": "both", "divergence": "jsd"}, {"missing": "truncate", "reduction": "none"}],
    ids=",".join,
)
def test_from_hidden_states(options: dict[str, Any]) -> None:
    widths, rows, width = (1, 60, 37, 22), 14, 8
    generator = torch.Generator().manual_seed(5)
    x, w, teacher = (torch.randn(shape, generator=generator) for shape in ((rows, width), (120, width), (rows, 120)))
    labels, how = make_labels(rows, vocabulary=120), dict(options)
    top = make_teacher(teacher * 3, 9, 2.0, how.pop("missing", "rest"))

    def work(rank: int, group: Any) -> tuple[Tensor, ...]:
        hidden, weight = x.clone().requires_grad_(), w.split(widths)[rank].clone().requires_grad_()
        loss_fn = FusedLinearKDLoss(process_group=group, chunk_rows=4, **how)
        loss = parts(loss_fn(hidden, weight, labels=labels, teacher_logits=top))
        return loss.detach(), *torch.autograd.grad(loss.sum(), (hidden, weight))

    losses, hidden, weight = zip(*on_ranks(4, work), strict=True)
    for each in (losses, hidden):
        assert all(torch.equal(z, each[0]) for z in each)
    exact = [z.double().requires_grad_() for z in (x, w)]
    how.pop("recompute", None)
    expected = kd_loss(exact[0] @ exact[1].T, top, labels, **how)
    assert_loss(losses[0], expected.detach(), LOSS_RELATIVE)
    for ours, right in zip((hidden[0], torch.cat(weight)), torch.autograd.grad(expected.sum(), exact), strict=True):
        assert (ours.double() - right).norm() <= 5e-6 * right.norm()
