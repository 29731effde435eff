"""Sparse teachers, against the float64 reference."""

import math
from dataclasses import astuple
from decimal import Context, Decimal, localcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    BACKENDS,
    INF,
    assert_loss,
    both,
    gradient_bound,
    make_labels,
    make_logits,
    make_normal,
    parts,
    placed,
)
from test_divergences import ONE_OF_EACH, gradient_error_bound
from test_memory import Allocations
from torch import Tensor

from fused_kd import FusedKDLoss, SparseTeacher, fused_kd_loss, ops, sparse
from fused_kd.backends import PREFERENCE, pytorch
from fused_kd.backends.rows import (
    LOG_RATIO,
    NO_LABEL,
    REST,
    SKIP,
    STATS,
    STUDENT_SUM,
    TEACHER_MAX,
    LogitRows,
    RowOptions,
)
from fused_kd.divergences import (
    JSD,
    AlphaBeta,
    CrossEntropy,
    Divergence,
    ForwardKL,
    LogitMSE,
    ReverseKL,
    SymmetricKL,
    TotalVariation,
)
from fused_kd.families import DECIMALS, Columns, Linear
from fused_kd.reference import hard_term
from fused_kd.sparse import MISSING
from fused_kd.taught import TaughtRows, Teacher

NAN = math.nan


def allowed(missing: str, divergence: Divergence) -> bool:
    if isinstance(divergence, LogitMSE):
        return False
    if missing == "truncate":
        return isinstance(divergence, (ForwardKL, ReverseKL, CrossEntropy))
    return missing != "renormalize" or not isinstance(divergence, AlphaBeta)


CASES = [
    pytest.param(missing, divergence, id=f"{missing}-{divergence!r}")
    for missing in MISSING
    for divergence in [*ONE_OF_EACH, SymmetricKL(1.0), AlphaBeta(2.0, 3.0), AlphaBeta(0.3, 0.7)]
    if allowed(missing, divergence) or (divergence == AlphaBeta(0.3, 0.7) and missing == "renormalize")
]


def make_teacher(teacher: Tensor, k: int, tau: float = 1.0, missing: Any = "rest", seed: int = 0) -> SparseTeacher:
    """Of these logits, with fewer slots in some rows, and in no particular order."""
    top = SparseTeacher.from_logits(teacher, k, tau, missing)
    generator = torch.Generator().manual_seed(seed)
    order, empty, by_id = (
        torch.rand(top.ids.shape, generator=generator, device="cpu").to(top.ids.device) for _ in range(3)
    )
    ids, log_probs = (x.gather(-1, order.argsort(-1)) for x in (top.ids, top.log_probs))
    empty, by_id = empty < 0.2, by_id < 0.5
    empty[..., 0] = False
    return SparseTeacher(ids.masked_fill(empty & by_id, -1).int(), log_probs.masked_fill(empty & ~by_id, -INF), missing)


def size_of_terms(student: Tensor, teacher: SparseTeacher, divergence: Divergence, tau: float) -> Tensor:
    """The sum of the absolute terms of missing="truncate", for rows [N, V]."""
    filled = (teacher.ids >= 0) & (teacher.log_probs > -INF)
    log_p = teacher.log_probs.double()
    log_q = (student.double() / tau).log_softmax(-1).gather(-1, teacher.ids.long().clamp(min=0))
    weight = log_q if isinstance(divergence, ReverseKL) else log_p
    terms = weight.exp() * (log_q if isinstance(divergence, CrossEntropy) else log_q - log_p)
    return torch.where(filled, terms, 0.0).abs().sum(-1)


def check_rows(student: Tensor, teacher: SparseTeacher, divergence: Divergence, tau: float, **options: Any) -> None:
    """The soft term of rows [N, V], and its gradient without tau^2."""
    options = {"temperature": tau, "alpha": 1.0, "t2_scaling": False, "reduction": "none", **options}
    loss, gradient, expected, exact = both(student, teacher, None, divergence=divergence, **options)
    if teacher.missing == "truncate":  # a sum of terms that may cancel: right to what they are right to
        assert ((loss - expected).abs() <= 1e-5 * size_of_terms(student, teacher, divergence, tau)).all()
    else:
        assert_loss(loss, expected)
    assert loss.dtype == torch.float32
    check_gradient(student, gradient, exact, divergence, tau, expected)


def check_gradient(
    student: Tensor, gradient: Tensor, exact: Tensor, divergence: Divergence, tau: float, soft: Tensor
) -> None:
    assert torch.equal(gradient.isnan(), exact.isnan())
    gradient, exact = gradient.nan_to_num(), exact.nan_to_num()
    error = (gradient.double() - exact).norm(dim=-1)
    bound = gradient_error_bound(student, exact, divergence, tau, soft) + 1e-14
    if student.dtype != torch.float32:
        bound = torch.maximum(bound, 1.1 * (exact.to(student.dtype).double() - exact).norm(dim=-1) + 1e-14)
    assert (error <= bound).all(), f"{(error / bound).max():.3g} times the bound"


@pytest.mark.parametrize(("missing", "divergence"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradient(dtype: torch.dtype, missing: str, divergence: Divergence, backend: str) -> None:
    for kind in ("wide", "peaked", "close", "big") if dtype == torch.float32 else ("wide",):
        student, teacher = make_logits(kind, 5, 400)
        for k, tau in ((1, 2.0), (17, 3.0)):
            sparse_teacher = make_teacher(teacher, k, tau, missing)
            if (
                missing == "renormalize"
                and isinstance(divergence, (ReverseKL, SymmetricKL))
                and divergence != SymmetricKL(1.0)
            ):
                continue  # +inf: test_what_is_infinite
            check_rows(student.to(dtype), sparse_teacher, divergence, tau, backend=backend)


def test_what_is_infinite(backend: str) -> None:
    """ "renormalize" puts p = 0 on the other columns, where q is not."""
    student, teacher = make_logits("wide", 3, 100)
    leaf = student.requires_grad_()
    for divergence in (ReverseKL(), SymmetricKL()):
        sparse_teacher = SparseTeacher.from_logits(teacher, 5, missing="renormalize")
        loss = fused_kd_loss(leaf, sparse_teacher, alpha=1.0, divergence=divergence, reduction="none", backend=backend)
        assert (loss == INF).all()  # type: ignore[operator]
        assert torch.autograd.grad(loss.sum(), leaf)[0].isnan().all()  # type: ignore[union-attr]


def exactly(student: Tensor, teacher: SparseTeacher, divergence: Divergence, tau: float) -> float:
    """The divergence of one row with missing="rest", in 40 digits but for the other columns' mass, which has 19."""
    ids, log_p = teacher.ids[0], teacher.log_probs[0].tolist()
    x = student[0].double().numpy().astype(np.longdouble) / np.longdouble(tau)
    others = np.ones(len(x), dtype=bool)
    others[ids.numpy()] = False
    with localcontext(Context(prec=40)):
        masses = [Decimal(float(v)).exp() for v in x[ids.numpy()]] + [Decimal(str(np.exp(x[others]).sum()))]
        p = [Decimal(v).exp() for v in log_p]
        p.append(1 - sum(p))
        q = [mass / sum(masses) for mass in masses]
        family = divergence.family or Linear(0.0 if isinstance(divergence, ReverseKL) else 1.0)
        family = type(family)(*map(Decimal, astuple(family)))  # type: ignore[call-overload]
        value = Decimal(0)
        for a, b in zip(p, q, strict=True):
            at = Columns(a, b, a.ln(), b.ln(), b.ln() - a.ln(), b - a)
            value += family.terms(DECIMALS, at)[0]
            if isinstance(divergence, CrossEntropy):
                value -= a * a.ln()
        return float(value)


# (float64 itself loses what the expected value is made of.)
@pytest.mark.parametrize("divergence", [x for x in ONE_OF_EACH if allowed("rest", x)], ids=repr)
def test_a_nearly_converged_student(divergence: Divergence, backend: str) -> None:
    noise, teacher = make_normal(1, 151936, seed=3)
    for sigma, tau in ((0.01, 1.0), (0.05, 4.0), (0.05, 20.0), (0.01, 100.0)):
        student = teacher * 3 + sigma * noise
        sparse_teacher = SparseTeacher.from_logits((teacher * 3).double(), 64, tau)
        options: dict[str, Any] = {"temperature": tau, "alpha": 1.0, "t2_scaling": False, "divergence": divergence}
        loss, gradient, _, exact = both(student, sparse_teacher, None, backend=backend, **options)
        assert_loss(loss, torch.tensor(exactly(student, sparse_teacher, divergence, tau), dtype=torch.float64), 1e-5)
        assert (gradient.double() - exact).norm() <= 5e-6 * exact.norm(), tau


@pytest.mark.parametrize(("missing", "divergence"), CASES)
def test_all_columns_are_the_dense_loss(missing: Any, divergence: Divergence) -> None:
    student, teacher = (x.double() for x in make_logits("wide", 3, 60))
    labels = make_labels(3, vocabulary=60)
    options: dict[str, Any] = {"divergence": divergence, "label_smoothing": 0.1, "temperature": 2.0}
    sparse_teacher = SparseTeacher.from_logits(teacher, 60, 2.0, missing)
    results = []
    for given_teacher in (teacher, sparse_teacher):
        leaf = student.clone().requires_grad_()
        loss = fused_kd_loss(leaf, given_teacher, labels, **options)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))  # type: ignore[union-attr]
    for dense, given_sparse in zip(*results, strict=True):
        torch.testing.assert_close(given_sparse, dense, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("missing", "divergence"), CASES)
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.7, "temperature": 3.0},
        {"alpha": 0.5, "hard_weight": 1.0, "label_smoothing": 0.1, "reduction": "sum"},
        {"alpha": 0.3, "shift": True, "reduction": "none", "inplace": True},
        {"alpha": 0.3, "soft_on_ignored": True, "reduction": "batchmean"},
        {"alpha": 0.9, "weights": torch.arange(10.0).reshape(2, 5), "inplace": True, "label_smoothing": 0.2},
        {"alpha": 1.0, "num_items": 7, "return_parts": True},
        {"alpha": 0.0},
    ],
    ids=",".join,
)
def test_with_the_options(options: dict[str, Any], missing: str, divergence: Divergence, backend: str) -> None:
    student, teacher = make_logits("wide", 2, 5, 100)
    if missing == "renormalize" and isinstance(divergence, (ReverseKL, SymmetricKL)):
        return
    sparse_teacher = make_teacher(teacher, 9, 2.0, missing)
    labels = make_labels(2, 5, vocabulary=100)
    labels[0, 1], labels[1, 2] = sparse_teacher.ids[0, 1, 0], sparse_teacher.ids[1, 2, 0]  # of the ids
    loss, gradient, expected, exact = both(
        student, sparse_teacher, labels, divergence=divergence, backend=backend, **options
    )
    assert_loss(loss, expected)
    assert (gradient.double() - exact).norm() <= gradient_bound(exact, torch.float32) * 2.5


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, SparseTeacher, Tensor, dict[str, Any]]:
    positions = [*draw(st.lists(st.integers(0, 4), max_size=2)), draw(st.integers(1, 4))]
    vocabulary = draw(st.sampled_from([1, 2, 7, 100]))
    seed, k = draw(st.integers(0, 1000)), draw(st.integers(1, min(vocabulary, 9)))
    # (Where no column is left that is neither listed nor -inf, PyTorch's logsumexp has no gradient.)
    kinds = ["wide", "masked", "big"] if vocabulary == 100 else ["wide", "big"]
    student, teacher = make_logits(draw(st.sampled_from(kinds)), *positions, vocabulary, seed=seed)
    missing = draw(st.sampled_from(MISSING))
    sparse_teacher = make_teacher(teacher, k, draw(st.floats(1, 5)), missing, seed)
    log_probs = sparse_teacher.log_probs.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))
    if len(positions) > 1 and draw(st.booleans()):
        student = student.transpose(0, 1).contiguous().transpose(0, 1)
    labels = make_labels(*positions, vocabulary=vocabulary, seed=seed)
    own = student.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    labels = labels.masked_fill(own.isinf(), -100)  # an impossible label is a case of its own
    options = {
        "temperature": draw(st.floats(0.5, 8)),
        "alpha": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "soft_on_ignored": draw(st.booleans()),
        "shift": draw(st.booleans()),
        "inplace": draw(st.booleans()),
    }
    return student, SparseTeacher(sparse_teacher.ids, log_probs, missing), labels, options


@pytest.mark.parametrize("backend_name", BACKENDS)
@given(call=calls())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_anything(call: tuple[Any, ...], backend_name: str) -> None:
    student, teacher, labels, options = call
    loss, gradient, expected, exact = both(student, teacher, labels, backend=backend_name, **options)
    assert_loss(loss, expected)
    assert torch.equal(gradient.isnan(), exact.isnan())
    gradient, exact = gradient.nan_to_num(), exact.nan_to_num()
    assert (gradient.double() - exact).norm() <= gradient_bound(exact, torch.float32)


@pytest.mark.parametrize(("missing", "divergence"), CASES)
def test_gradcheck(missing: Any, divergence: Divergence) -> None:
    if missing == "renormalize" and isinstance(divergence, (ReverseKL, SymmetricKL)):
        return
    student, teacher = (x.double() for x in make_logits("wide", 2, 2, 7))
    labels, sparse_teacher = make_labels(2, 2, vocabulary=7), make_teacher(teacher, 3, 1.0, missing)
    labels[0, 0] = sparse_teacher.ids[0, 0, 0]
    leaf = student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: fused_kd_loss(s, sparse_teacher, labels, divergence=divergence, label_smoothing=0.1), leaf
    )


def rows_of(
    backend: str, student: Tensor, teacher: SparseTeacher, labels: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The loss of each row, and its gradient."""
    leaf = student.clone().requires_grad_()
    options = {"alpha": 1.0, "reduction": "none", "backend": backend, **options}
    loss = fused_kd_loss(leaf, teacher, labels, **options)
    assert isinstance(loss, Tensor)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def test_the_digits_of_a_sure_student(backend: str) -> None:
    """Whose other columns have 1e-6, 1e-12 and e^-200 of q: 1 - sum q would not know."""
    teacher = torch.zeros(1, 50)
    teacher[0, 7] = 2.0
    for margin in (14.0, 28.0, 200.0):
        student = make_normal(1, 50, seed=1)[0]
        student[0, 7] += margin
        for divergence in (ForwardKL(), ReverseKL(), TotalVariation()):
            for k in (1, 3):
                check_rows(student, SparseTeacher.from_logits(teacher, k), divergence, 1.0, backend=backend)


def test_minus_infinity(backend: str) -> None:
    student, teacher = make_logits("wide", 4, 30)
    sparse_teacher = SparseTeacher.from_logits(teacher, 3)
    student[0].scatter_(0, sparse_teacher.ids[0], -INF)  # all of the ids
    student[1, sparse_teacher.ids[1, 0]] = -INF
    others = torch.ones(30, dtype=torch.bool).index_fill(0, sparse_teacher.ids[2], False)
    student[2, others] = -INF  # all but them
    student[3, :5] = -INF
    for missing in MISSING:
        loss, gradient = rows_of(backend, student, SparseTeacher(sparse_teacher.ids, sparse_teacher.log_probs, missing))
        infinite = [missing != "both" or None, True, missing == "rest", False]
        for row, expected in enumerate(infinite):
            if expected is None:  # nothing of q is left
                assert loss[row].isnan()
            else:
                assert (loss[row] == INF) == expected, (missing, row)
                assert gradient[row].isfinite().all(), (missing, row)
                assert (gradient[row][student[row] == -INF][3:] == 0).all()
    for divergence in (JSD(), TotalVariation(), AlphaBeta(0.3, 0.7)):
        some = torch.tensor([0, 1, 3])  # (of the third row PyTorch's logsumexp has no gradient)
        chosen = SparseTeacher(sparse_teacher.ids[some], sparse_teacher.log_probs[some])
        check_rows(student[some], chosen, divergence, 2.0, backend=backend)
        results = rows_of(backend, student, sparse_teacher, divergence=divergence)
        nearly = rows_of(backend, student.clamp(min=-1e4), sparse_teacher, divergence=divergence)
        for one, other in zip(results, nearly, strict=True):
            torch.testing.assert_close(one[2], other[2])


def test_rows_without_a_slot(backend: str) -> None:
    """The one class there is has all of p and q; where p is divided by its sum, there is no p."""
    student, teacher = make_logits("wide", 2, 30)
    top = SparseTeacher.from_logits(teacher, 3)
    ids = top.ids.index_fill(0, torch.tensor([0]), -1)
    for missing in MISSING:
        loss, gradient = rows_of(backend, student, SparseTeacher(ids, top.log_probs, missing))
        if missing in ("renormalize", "both"):
            assert loss[0].isnan()
            assert gradient[0].isnan().all()
        else:
            assert loss[0] == 0
            assert (gradient[0] == 0).all()
        assert loss[1].isfinite()
    # With a hard term nothing is scattered where no slot is.
    hard = rows_of(backend, student, SparseTeacher(ids, top.log_probs), torch.tensor([4, 5]), alpha=0.5)[1][0]
    exact = student.double().requires_grad_()
    (expected,) = torch.autograd.grad(hard_term(exact, torch.tensor([4, 5]), label_smoothing=0.0)[0], exact)
    torch.testing.assert_close(hard.double(), expected[0] / 2, rtol=1e-5, atol=1e-8)


def test_skipped_rows_are_not_looked_at(backend: str) -> None:
    student, teacher = make_logits("wide", 4, 30)
    top = SparseTeacher.from_logits(teacher, 3)
    labels = torch.tensor([3, -100, 5, -100])
    expected = rows_of(backend, student, top, labels, alpha=0.5)
    ids, log_probs = top.ids.clone(), top.log_probs.clone()
    ids[1], log_probs[3], student[1] = torch.tensor([99, 5, 5]), NAN, NAN
    for one, other in zip(
        rows_of(backend, student, SparseTeacher(ids, log_probs), labels, alpha=0.5), expected, strict=True
    ):
        assert torch.equal(one, other)
        assert (one[[1, 3]] == 0).all()


@pytest.mark.parametrize("missing", MISSING)
def test_what_is_not_finite_stays_in_its_row(missing: Any, backend: str) -> None:
    student, teacher = make_logits("wide", 4, 30)
    top = SparseTeacher.from_logits(teacher, 3, 1.0, missing)
    other = next(j for j in range(30) if j not in top.ids[1])
    for column in (int(top.ids[1, 0]), other):
        for value in (NAN, INF):
            changed = student.clone()
            changed[1, column] = value
            loss, gradient = rows_of(backend, changed, top)
            assert loss.isnan().tolist() == [False, True, False, False], (column, value)
            assert gradient.isnan().all(-1).tolist() == gradient.isnan().any(-1).tolist() == [False, True, False, False]
    log_probs = top.log_probs.clone()
    log_probs[2, 1] = NAN
    loss, gradient = rows_of(backend, student, SparseTeacher(top.ids, log_probs, missing))
    assert loss.isnan().tolist() == gradient.isnan().all(-1).tolist() == [False, False, True, False]


def test_on_a_gpu_a_bad_row_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is an error on the CPU, where values can be looked at."""
    _, teacher = make_logits("wide", 5, 30)
    top = SparseTeacher.from_logits(teacher, 3)
    ids, log_probs = top.ids.clone(), top.log_probs.clone()
    ids[0, 1], ids[1, 2], ids[2, 2], log_probs[3] = 30, -7, ids[2, 0], 3.0
    slots = sparse._slots((ids, log_probs), 30)
    targets = torch.full((5,), NO_LABEL)

    class Elsewhere:
        """These, as if they lay on a GPU."""

        device = torch.device("cuda")

        def __ne__(self, other: object) -> Any:
            return targets != other

    for log_p in sparse._checked(slots, Elsewhere(), "rest", 30):  # type: ignore[arg-type]
        assert log_p.isnan().all(-1).tolist() == [True, True, True, True, False]
    assert slots.ids.min() >= -1
    assert slots.ids.max() < 30


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_of_the_logits_size_is_allocated(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytorch, "_CHUNK", 1 << 14)
    student, teacher = make_logits("wide", 4, 16, 2048)
    top = SparseTeacher.from_logits(teacher, 8)
    targets, ones = make_labels(64, vocabulary=2048), torch.ones(64)
    options = RowOptions(2.0, 2.0, "jsd", 0.1, True, True, "torch")
    rows = TaughtRows(student, Teacher("rest", (top.ids, top.log_probs)), targets, options)
    out = student if inplace else torch.empty_like(student)
    with Allocations() as seen:
        stats = sparse.rows_forward(rows)[2]
        sparse.rows_backward(rows, stats, ones, ones, out)
    assert seen.largest <= 8 << 14 < 4 * student.numel()
    assert stats.shape == (64, STATS + 9)


def test_from_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_PIECE", 100)
    _, teacher = make_logits("wide", 3, 4, 50)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        top = SparseTeacher.from_logits(teacher.to(dtype), np.int64(7), np.float32(2), "both")  # type: ignore[arg-type]
        exact = torch.log_softmax(teacher.to(dtype).double() / 2, -1)
        assert top.ids.shape == (3, 4, 7)
        assert top.missing == "both"
        assert top.log_probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(top.log_probs.double(), exact.topk(7, -1).values, rtol=1e-6, atol=0)
        torch.testing.assert_close(exact.gather(-1, top.ids), exact.topk(7, -1).values)


def loss_and_gradient(f: Any, student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    loss = f(leaf * 1.5, *arguments)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@pytest.mark.parametrize("options", [{}, {"divergence": "jsd", "reduction": "none"}, {"inplace": True}], ids=str)
def test_compile(options: dict[str, Any]) -> None:
    student, teacher = make_logits("wide", 6, 200)
    labels, top = make_labels(6, vocabulary=200), SparseTeacher.from_logits(teacher, 5)
    loss_fn = FusedKDLoss(**options)

    def made_inside(s: Tensor, ids: Tensor, log_probs: Tensor, y: Tensor) -> Any:
        return loss_fn(s, SparseTeacher(ids, log_probs), y)

    expected = loss_and_gradient(loss_fn, student, top, labels)
    torch._dynamo.reset()
    for f, arguments in ((loss_fn, (top,)), (made_inside, (top.ids, top.log_probs))):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        for one, other in zip(loss_and_gradient(compiled, student, *arguments, labels), expected, strict=True):
            torch.testing.assert_close(one, other)
        with torch.no_grad():
            torch.testing.assert_close(compiled(student * 1.5, *arguments, labels), expected[0])


def test_compile_with_another_number_of_rows() -> None:
    loss_fn = FusedKDLoss()
    torch._dynamo.reset()
    compiled = torch.compile(loss_fn, fullgraph=True, backend="inductor", dynamic=True)
    for rows in (6, 9):
        student, teacher = make_logits("wide", rows, 200)
        labels, top = make_labels(rows, vocabulary=200), SparseTeacher.from_logits(teacher, 5)
        expected = loss_and_gradient(loss_fn, student, top, labels)
        for one, other in zip(loss_and_gradient(compiled, student, top, labels), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_transforms() -> None:
    student, teacher = make_logits("wide", 3, 4, 50)
    labels, top = make_labels(3, 4, vocabulary=50), SparseTeacher.from_logits(teacher, 5)

    def loss(s: Tensor, ids: Tensor, log_probs: Tensor, y: Tensor) -> Tensor:
        result = fused_kd_loss(s, SparseTeacher(ids, log_probs), y)
        assert isinstance(result, Tensor)
        return result

    arguments = (student, top.ids, top.log_probs, labels)
    rows = [loss_and_gradient(lambda s, *r: loss(s / 1.5, *r), *x) for x in zip(*arguments, strict=True)]
    torch.testing.assert_close(torch.func.vmap(loss)(*arguments), torch.stack([x for x, _ in rows]))
    gradients = torch.func.vmap(torch.func.grad(loss))(*arguments)
    torch.testing.assert_close(gradients, torch.stack([x for _, x in rows]))


def test_nothing_waits_for_a_gpu() -> None:
    """Tensors without values in the place of a GPU's: reading one would raise."""
    student, logits = make_logits("wide", 3, 4, 50)
    top = SparseTeacher.from_logits(logits, 5)
    teacher = SparseTeacher(top.ids.to("meta"), top.log_probs.to("meta"))
    labels = make_labels(3, 4, vocabulary=50).to("meta")
    for options in ({}, {"reduction": "none", "shift": True}, {"return_parts": True, "entropies": True}):
        leaf = student.to("meta").requires_grad_()
        loss = parts(fused_kd_loss(leaf, teacher, labels, label_smoothing=0.1, **options))
        assert torch.autograd.grad(loss.sum(), leaf)[0].shape == student.shape


def test_operators() -> None:
    student, teacher = make_logits("wide", 2, 3, 50)
    top = SparseTeacher.from_logits(teacher, 4)
    targets, vector = torch.tensor([1, 2, SKIP, NO_LABEL, 4, 49]), torch.rand(6)
    options = RowOptions(2.0, 2.0, "forward_kl", 0.0, True, True, "auto")
    arguments = ([top.ids, top.log_probs], targets)
    stats = ops.teachers_forward(student, *arguments, "rest", *options)[2]
    rest = (*arguments, stats, vector, vector, "rest", *options)
    for logits in (student, student.clone().requires_grad_()):
        torch.library.opcheck(ops.teachers_forward, (logits, *arguments, "rest", *options))
    torch.library.opcheck(ops.teachers_backward, (student, *rest))
    torch.library.opcheck(ops.teachers_backward_, (student.clone(), *rest))
    with pytest.raises(ValueError, match="teacher must be ids .* and log_probs .*, got 1 tensors"):
        ops.teachers_forward(student, [top.ids], targets, "rest", *options)


@pytest.mark.parametrize("shape", [(4, 50), (5, 9001)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_verb_of_the_other_columns(dtype: torch.dtype, shape: tuple[int, int], backend: str) -> None:
    if dtype == torch.float64 and backend != "torch":
        return
    student, teacher = (x.to(dtype) for x in make_logits("wide", *shape))
    rows, columns = shape
    ids = teacher.topk(3, -1).indices
    ids[1, 1], ids[3, 2] = -1, columns - 1
    targets = torch.tensor([1, int(ids[1, 0]), SKIP, NO_LABEL, columns - 1][:rows])
    grads = torch.tensor([0.5, 2.0, 1.0, -1.0, 1.0][:rows], dtype=dtype)
    options = RowOptions(3.0, 3.0, REST, 0.1, True, True, backend)
    exact = student.double().requires_grad_()
    others = torch.ones(rows, columns + 1, dtype=torch.bool).scatter(1, ids.where(ids >= 0, columns), False)[:, :-1]
    soft = (exact / 3).masked_fill(~others, -INF).logsumexp(-1)
    hard = torch.nn.functional.cross_entropy(exact, targets.clamp(min=0), label_smoothing=0.1, reduction="none")
    counted = targets != SKIP
    soft, hard = soft * counted, hard * (counted & (targets != NO_LABEL))
    (gradient,) = torch.autograd.grad((grads.double() * (soft + hard)).sum(), exact)
    results = ops.rows_forward(student, ids, targets, *options)
    found = ops.rows_backward(student, ids, targets, results[2], grads, grads, *options)
    fused = ops.rows_fused(student, ids, targets, grads, grads, *options)
    tolerances = {"rtol": 1e-7, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 3e-6, "atol": 1e-9}
    for one, other in ((results[0], soft), (results[1], hard), (fused[0], soft), (fused[1], hard)):
        torch.testing.assert_close(one.double(), other.detach(), **tolerances)
    for one in (found, fused[2]):
        torch.testing.assert_close(one.double().where(others, 0.0), gradient.where(others, 0.0), **tolerances)
    # What soft alone, rounded, does not have.
    stats = results[2].double()
    of_rest = stats[:, TEACHER_MAX] / 3 + (stats[:, STUDENT_SUM] + stats[:, LOG_RATIO]).log()
    assert ((of_rest - soft)[counted].abs() <= 2e-8).all()
    with pytest.raises(TypeError, match="teacher must be int64 ids"):
        ops.rows_forward(student, ids.int(), targets, *options)


def check_where_rows_lie(backend: str, columns: int) -> None:
    """The verbs have the same bits wherever logits and gradient lie, and fused is forward and backward. Every listed
    column counts, those at both ends of a section too."""
    verbs, ones = PREFERENCE[backend], torch.ones(3)
    student, _ = make_logits("wide", 3, columns)
    ends = sorted({0, 7, *(j for i in (4096, 8192, 16384) for j in (i - 1, i) if j < columns), columns - 1})
    ids = torch.tensor([ends, [-1, *ends[:0:-1]], ends])
    student[0, ends] = student[1, ends[1:]] = 30.0
    targets = torch.tensor([0, NO_LABEL, SKIP])
    options = RowOptions(3.0, 3.0, REST, 0.0, True, True, backend)
    results = []
    for offset, gap in ((0, -columns % 8), (0, 0), (3, 1)):
        rows = LogitRows(placed(student, offset, gap), ids, targets, options)
        out, fused_out = torch.empty_like(student), placed(student, offset, gap)
        forward = verbs.rows_forward(rows)
        verbs.rows_backward(rows, forward[2], ones, ones, out)
        fused = verbs.rows_fused(rows, ones, ones, fused_out)
        assert torch.equal(fused_out, out)
        assert torch.equal(fused[0], forward[0])
        results.append([*forward, out])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, results[0], strict=True))
    exact = student[:2].double()
    exact[0, ends] = exact[1, ends[1:]] = -INF
    assert_loss(results[0][0], torch.cat([(exact / 3).logsumexp(-1), torch.zeros(1).double()]))


@pytest.mark.parametrize("columns", [97, 9001])
def test_bits_do_not_depend_on_where_rows_lie(columns: int, backend: str) -> None:
    check_where_rows_lie(backend, columns)


def check_log_rest(backend: str) -> None:
    """Close to the teacher at tau = 100 float32 would not do: stats have R in two numbers."""
    noise, _ = make_normal(1, 151936, seed=0)
    ids = noise.topk(64, -1).indices
    options = RowOptions(100.0, 100.0, REST, 0.0, True, False, backend)
    rows = LogitRows(noise * 3, ids, torch.tensor([NO_LABEL]), options)
    stats = PREFERENCE[backend].rows_forward(rows)[2][0].double()
    found = stats[TEACHER_MAX] / 100 + (stats[STUDENT_SUM] + stats[LOG_RATIO]).log()
    exact = (noise * 3).double().div(100).scatter(-1, ids, -INF).logsumexp(-1)
    assert abs(found - exact) <= 1e-9


def test_log_rest(backend: str) -> None:
    check_log_rest(backend)


IDS, LOGS, S = torch.tensor([[1, 2], [3, -1]]), torch.full((2, 2), -1.0), torch.randn(2, 10)

MADE: list[tuple[Any, type[Exception], str]] = [
    (lambda: SparseTeacher(IDS.float(), LOGS), TypeError, "ids must be an int32 or int64 tensor.*got torch.float32"),
    (lambda: SparseTeacher([1], LOGS), TypeError, "ids must be an int32 or int64 tensor.*got list"),  # type: ignore[arg-type]
    (lambda: SparseTeacher(IDS, LOGS.int()), TypeError, "log_probs must be a floating tensor, got torch.int32"),
    (
        lambda: SparseTeacher(IDS, LOGS[:1]),
        ValueError,
        r"ids and log_probs must have the same shape.*\(2, 2\).*\(1, 2\)",
    ),
    (lambda: SparseTeacher(IDS[:, :0], LOGS[:, :0]), ValueError, "at least one slot"),
    (lambda: SparseTeacher(IDS, LOGS.to("meta")), ValueError, "log_probs must be on the ids' device cpu, got meta"),
    (lambda: SparseTeacher(IDS, LOGS, "tail"), ValueError, "missing must be one of 'rest', .*got 'tail'"),  # type: ignore[arg-type]
    (lambda: SparseTeacher.from_logits(S, 0), ValueError, "k must be an int from 1 to the vocabulary's size 10, got 0"),
    (lambda: SparseTeacher.from_logits(S, 11), ValueError, "k must be an int from 1 to .* 10, got 11"),
    (lambda: SparseTeacher.from_logits(S, 2, 0.0), ValueError, "temperature must be finite and greater than 0"),
    (lambda: SparseTeacher.from_logits(S.long(), 2), TypeError, "teacher_logits must be float32"),
    (lambda: SparseTeacher.from_logits([S], 2), TypeError, "teacher_logits must be a tensor, got list"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "error", "message"), MADE, ids=[x[2][:50] for x in MADE])
def test_what_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def wrong(**changes: Any) -> SparseTeacher:
    return SparseTeacher(changes.get("ids", IDS), changes.get("log_probs", LOGS), changes.get("missing", "rest"))


CALLS: list[tuple[SparseTeacher, dict[str, Any], type[Exception], str]] = [
    (wrong(), {"teacher_temperature": 2.0}, ValueError, "teacher_temperature is 2.0, but the log-prob.*already have"),
    (wrong(), {"teacher_weights": [1.0]}, ValueError, "teacher_weights weighs several teachers"),
    (wrong(), {"divergence": "logit_mse"}, ValueError, "divergence 'logit_mse' compares logits"),
    (
        wrong(missing="truncate"),
        {"divergence": "jsd"},
        ValueError,
        "missing='truncate' has the divergences .*got 'jsd'",
    ),
    (wrong(missing="renormalize"), {"divergence": AlphaBeta(1, 1)}, ValueError, "take alpha.*beta = 1"),
    (wrong(ids=IDS[:1], log_probs=LOGS[:1]), {}, ValueError, r"the student's leading shape.*\(1, 2\).*\(2, 10\)"),
    (wrong(ids=IDS.to("meta"), log_probs=LOGS.to("meta")), {}, ValueError, "must be on the student's device cpu"),
    (wrong(ids=IDS + 7), {}, IndexError, r"ids: row 1 has an id in slot 0 that is not in \[0, 10\)"),
    (wrong(ids=IDS - 1), {}, IndexError, r"ids: row 1 has an id in slot 1 that is not in \[0, 10\)"),
    (wrong(ids=torch.tensor([[1, 2], [3, 3]])), {}, IndexError, "ids: row 1 has the id 3 twice"),
    (wrong(log_probs=LOGS + 2), {}, ValueError, "log_probs: the probabilities of row 0 sum to 5.44, more than 1"),
]


@pytest.mark.parametrize(("teacher", "options", "error", "message"), CALLS, ids=[x[3][:50] for x in CALLS])
def test_errors(teacher: SparseTeacher, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused_kd_loss(S, teacher, alpha=1.0, **options)


def test_a_sparse_teacher_is_no_member_of_an_ensemble() -> None:
    with pytest.raises(TypeError, match=r"teacher_logits\[1\] must be a tensor, got SparseTeacher"):
        fused_kd_loss(S, [S, wrong()], alpha=1.0)  # type: ignore[list-item]
