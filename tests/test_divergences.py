"""Every divergence against the float64 reference, and against what others call it."""

import math
from dataclasses import astuple
from decimal import Context, Decimal, localcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BACKENDS, DTYPES, INF, assert_loss, both, gradient_bound, make_labels, make_logits, make_normal
from torch import Tensor

from fused_kd import FusedKDLoss, fused_kd_loss, ops
from fused_kd.backends import PREFERENCE, refusal
from fused_kd.backends.rows import NO_LABEL, RowOptions
from fused_kd.divergences import (
    DIVERGENCES,
    JSD,
    AlphaBeta,
    AlphaDivergence,
    CrossEntropy,
    Divergence,
    DivergenceName,
    ForwardKL,
    LogitMSE,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    SymmetricKL,
    TotalVariation,
    divergence_of,
)
from fused_kd.families import DECIMALS, AlphaBetaFamily, Columns, Family, Linear, Mixture, column_terms, near
from fused_kd.reference import kd_loss

KINDS: list[Divergence] = [
    ForwardKL(), CrossEntropy(), ReverseKL(), SymmetricKL(), SymmetricKL(0.2), SymmetricKL(1.0), JSD(), JSD(0.1),
    JSD(0.9), SkewKL(), SkewReverseKL(), TotalVariation(), AlphaDivergence(0.5), AlphaDivergence(0.1),
    AlphaDivergence(0.99), AlphaBeta(0.2, 0.7), AlphaBeta(2.0, 3.0), LogitMSE(), LogitMSE(centred=False),
]  # fmt: skip
ONE_OF_EACH = [next(x for x in KINDS if type(x) is kind) for kind in DIVERGENCES.values()]
PAIRS = [
    pytest.param(kind, name, id=f"{kind!r}-{name}")
    for kind in KINDS
    for name in BACKENDS
    if refusal(PREFERENCE[name], torch.empty(1, 2), torch.empty(1, 2), kind.name) is None
]

SECOND_SWEEP = [pair for pair in PAIRS if not isinstance(pair.values[0], (ForwardKL, CrossEntropy))]


def gradient_error_bound(student: Tensor, exact: Tensor, divergence: Divergence, tau: float, soft: Tensor) -> Tensor:
    """Of the float32 gradient's error: far from the teacher, c and q G cancel."""
    near_or_simple = 5e-6 * exact.norm(dim=-1)
    if isinstance(divergence, LogitMSE):
        return near_or_simple
    q = torch.softmax(student.double() / tau, -1)
    return near_or_simple + 5e-6 * (1 + soft) * q.norm(dim=-1) / tau


def check_rows(student: Tensor, teacher: Tensor, divergence: Divergence, tau: float, backend: str) -> None:
    """The soft term of rows [N, V], and its gradient without tau^2."""
    options: dict[str, Any] = {"temperature": tau, "alpha": 1.0, "t2_scaling": False, "reduction": "none"}
    loss, gradient, expected, exact = both(student, teacher, None, divergence=divergence, backend=backend, **options)
    assert_loss(loss, expected)
    assert (gradient.isnan() == exact.isnan()).all()
    error = (gradient.double() - exact).norm(dim=-1)
    bound = gradient_error_bound(student, exact, divergence, tau, expected)
    if student.dtype != torch.float32:
        bound = torch.maximum(bound, 1.1 * (exact.to(student.dtype).double() - exact).norm(dim=-1) + 1e-14)
    assert (error <= bound).all(), f"{(error / bound).max():.3g} times the bound"


@pytest.mark.parametrize(("divergence", "backend_name"), PAIRS)
@pytest.mark.parametrize("kind", ["wide", "peaked", "close", "big"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradient(dtype: torch.dtype, kind: str, divergence: Divergence, backend_name: str) -> None:
    student, teacher = (x.to(dtype) for x in make_logits(kind, 4, 3000))
    for tau in (1.0, 3.0):
        check_rows(student, teacher, divergence, tau, backend_name)


@pytest.mark.parametrize(("divergence", "backend_name"), PAIRS)
@pytest.mark.parametrize("sigma", [0.01, 0.05, 1.0, 300.0])
@pytest.mark.parametrize("tau", [1.0, 4.0, 20.0, 100.0])
def test_a_large_vocabulary(tau: float, sigma: float, divergence: Divergence, backend_name: str) -> None:
    noise, teacher = make_normal(1, 151936, seed=3)
    check_rows(teacher * 3 + sigma * noise, teacher * 3, divergence, tau, backend_name)


@pytest.mark.parametrize(("divergence", "backend_name"), PAIRS)
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.7, "temperature": 3.0},
        {"alpha": 0.5, "hard_weight": 1.0, "label_smoothing": 0.1, "reduction": "sum"},
        {"alpha": 0.3, "shift": True, "reduction": "none", "inplace": True},
        {"alpha": 0.3, "soft_on_ignored": True, "reduction": "batchmean"},
        {"alpha": 0.9, "teacher_temperature": 3.5, "weights": torch.arange(10.0).reshape(2, 5)},
        {"alpha": 1.0, "vocab_mismatch": "truncate", "num_items": 7, "return_parts": True},
    ],
    ids=",".join,
)
def test_with_the_options(options: dict[str, Any], divergence: Divergence, backend_name: str) -> None:
    student, teacher = make_logits("wide", 2, 5, 300)
    if "vocab_mismatch" in options:
        teacher = teacher[..., :270]
    labels = make_labels(2, 5, vocabulary=270)
    loss, gradient, expected, exact = both(
        student, teacher, labels, divergence=divergence, backend=backend_name, **options
    )
    assert_loss(loss, expected)
    assert (gradient.double() - exact).norm() <= gradient_bound(exact, torch.float32) * 2.5


# (Of forward KL and cross entropy test_functional.py has this, and test_edge_cases.py what lies outside the bounds.)
@pytest.mark.parametrize(("divergence", "backend_name"), SECOND_SWEEP)
@given(data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_rows(divergence: Divergence, backend_name: str, data: st.DataObject) -> None:
    columns, seed = data.draw(st.sampled_from([1, 3, 17, 1000, 5000])), data.draw(st.integers(0, 1000))
    tau, sigma = (
        data.draw(st.floats(1, 100)),
        data.draw(st.sampled_from([0.01, 0.3, 3.0] if columns > 17 else [0.3, 3.0])),
    )
    noise, teacher = make_normal(3, columns, seed=seed)
    teacher = teacher * data.draw(st.sampled_from([1.0, 6.0]))
    student = teacher + sigma * tau * noise + data.draw(st.sampled_from([0.0, 9.0]))
    check_rows(student, teacher, divergence, tau, backend_name)


@pytest.mark.parametrize(("divergence", "backend_name"), PAIRS)
def test_far_by_kl_alone(divergence: Divergence, backend_name: str) -> None:
    """A student that has ruled out a token with 1e-4 of p and is close elsewhere: KL(p || q) is above 1, a mixture's
    divergence 1e-4, and the shortcut of a far student would show."""
    noise, teacher = make_normal(4, 5000, seed=8)
    student = teacher + 0.01 * noise
    teacher[:, 7] = teacher.logsumexp(-1) - 9
    student[:, 7] = teacher[:, 7] - 2e4
    check_rows(student, teacher, divergence, 1.0, backend_name)


@pytest.mark.parametrize(("divergence", "backend_name"), [x for x in PAIRS if x.values[0] in ONE_OF_EACH])
def test_the_gradient_close_to_the_teacher(divergence: Divergence, backend_name: str) -> None:
    noise, teacher = make_normal(4, 5000, seed=9)
    options: dict[str, Any] = {"alpha": 1.0, "divergence": divergence, "backend": backend_name}
    for sigma in (0.01, 0.1, 1.0):
        _, gradient, _, exact = both(teacher * 3 + sigma * noise, teacher * 3, None, **options)
        assert (gradient.double() - exact).norm() <= 5e-6 * exact.norm(), sigma


@pytest.mark.parametrize(("divergence", "backend_name"), PAIRS)
@pytest.mark.parametrize("where", ["teacher", "student", "both"])
def test_minus_infinity(where: str, divergence: Divergence, backend_name: str) -> None:
    student, teacher = make_logits("wide", 3, 300)
    if where != "student":
        teacher[:, ::3] = -INF
    if where != "teacher":
        student[:, ::3] = -INF
    options: dict[str, Any] = {"alpha": 1.0, "reduction": "none", "divergence": divergence, "backend": backend_name}
    loss, gradient, expected, exact = both(student, teacher, None, **options)
    of_p = isinstance(divergence, (ForwardKL, CrossEntropy, SymmetricKL))
    of_q = isinstance(divergence, ReverseKL) or (isinstance(divergence, SymmetricKL) and divergence.ratio < 1)
    infinite = (where == "student" and of_p) or (where == "teacher" and of_q)
    assert (loss == INF).all() == infinite
    if where == "teacher" and of_q:
        assert gradient.isnan().all()
        return
    assert gradient.isfinite().all()
    assert_loss(loss, expected)
    if where == "both":
        assert (gradient[:, ::3] == 0).all()
    if exact.isfinite().all():  # (not for a symmetric one of an infinite value, in PyTorch's formula)
        assert (gradient.double() - exact).norm() <= 5e-6 * exact.norm()


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=repr)
def test_gradcheck(divergence: Divergence) -> None:
    student, teacher = (x.double() for x in make_logits("wide", 2, 3, 20))
    labels = make_labels(2, 3, vocabulary=20)
    torch.autograd.gradcheck(
        lambda s: fused_kd_loss(s, teacher, labels, divergence=divergence, temperature=3.0), student.requires_grad_()
    )


@pytest.mark.parametrize(("divergence", "backend_name"), [x for x in PAIRS if x.values[0] in ONE_OF_EACH])
def test_fused_verb(divergence: Divergence, backend_name: str) -> None:
    student, teacher = make_logits("wide", 4, 500)
    targets, coef = torch.tensor([3, NO_LABEL, -100, 7]), torch.arange(4.0)
    options = RowOptions(2.0, 2.0, divergence.name, 0.0, True, True, backend_name, divergence.parameters)
    soft, hard, stats = ops.rows_forward(student, teacher, targets, *options)
    gradient = ops.rows_backward(student, teacher, targets, stats, coef, coef, *options)
    fused = ops.rows_fused(student, teacher, targets, coef, coef, *options)
    for one, other in zip((soft, hard), fused[:2], strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-9)
    assert (gradient - fused[2]).norm() <= 2e-6 * gradient.norm()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (student.requires_grad_(), teacher, targets, *options)
    torch.library.opcheck(torch.ops.fused_kd.rows_forward.default, arguments, test_utils=tests)


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=repr)
def test_compile(divergence: Divergence) -> None:
    student, teacher = make_logits("wide", 6, 200)
    labels = make_labels(6, vocabulary=200)
    loss_fn = FusedKDLoss(divergence=divergence)

    def loss_and_gradient(f: Any) -> tuple[Tensor, Tensor]:
        leaf = student.clone().requires_grad_()
        loss = f(leaf * 1.5, teacher, labels)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    torch._dynamo.reset()
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    for one, other in zip(loss_and_gradient(compiled), loss_and_gradient(loss_fn), strict=True):
        torch.testing.assert_close(one, other)


def test_a_parameter_that_changes_is_not_compiled_again_and_again() -> None:
    student, teacher = make_logits("wide", 6, 200)
    compilations = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return graph

    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=count)
    def loss(beta: float) -> Tensor:
        result = fused_kd_loss(student, teacher, alpha=1.0, divergence=JSD(beta))
        assert isinstance(result, Tensor)
        return result

    for beta in (0.1, 0.2, 0.35, 0.6, 0.85):
        expected = fused_kd_loss(student, teacher, alpha=1.0, divergence=JSD(beta))
        torch.testing.assert_close(loss(beta), expected)
    assert compilations <= 2


def soft_term(divergence: Divergence | DivergenceName, tau: float = 1.0, factor: float = 1.0) -> Tensor:
    """Of three rows, in float64."""
    student, teacher = (x.double() for x in make_logits("wide", 3, 50))
    options: dict[str, Any] = {"alpha": 1.0, "t2_scaling": False, "reduction": "none", "temperature": tau}
    result = fused_kd_loss(student, teacher, divergence=divergence, **options)
    assert isinstance(result, Tensor)
    return result * factor


def test_members_that_are_the_same() -> None:
    def same(one: Tensor, other: Tensor, tolerance: float = 1e-12) -> None:
        torch.testing.assert_close(one, other, rtol=tolerance, atol=0)

    for name, kind in DIVERGENCES.items():
        assert kind.name == name
        if name not in ("alpha_divergence", "alpha_beta"):
            same(soft_term(name), soft_term(kind()))  # type: ignore[arg-type]
            assert divergence_of(name) == kind()
    forward, reverse = soft_term(ForwardKL()), soft_term(ReverseKL())
    same(soft_term(SymmetricKL(1.0)), forward)
    same(soft_term(SymmetricKL(0.0)), reverse)
    same(soft_term(SymmetricKL(0.3)), 0.3 * forward + 0.7 * reverse)
    same(soft_term(JSD(0.3)), 0.3 * soft_term(SkewKL(0.3)) + 0.7 * soft_term(SkewReverseKL(0.7)))
    same(soft_term(AlphaBeta(0.3, 0.7)), soft_term(AlphaDivergence(0.7)))
    same(soft_term(AlphaDivergence(1e-5)), forward, 1e-3)
    same(soft_term(AlphaDivergence(1 - 1e-5)), reverse, 1e-3)
    student, teacher = (torch.softmax(x.double(), -1) for x in make_logits("wide", 3, 50))
    same(soft_term(AlphaDivergence(0.5)), 4 * (1 - (student * teacher).sqrt().sum(-1)))
    same(soft_term(TotalVariation()), (student - teacher).abs().sum(-1) / 2)


def test_logit_matching_is_the_limit_of_a_high_temperature() -> None:
    """Section 2.1 of the paper."""
    distances = []
    for tau in (1e2, 1e3, 1e4):
        kl, mse = soft_term(ForwardKL(), tau, tau**2), soft_term(LogitMSE(), tau, tau**2)
        distances.append(((kl - mse).abs() / mse).max().item())
    assert distances[0] < 0.2
    assert distances[1] < distances[0] / 5
    assert distances[2] < 1e-3


def test_logit_mse_leaves_out_what_is_not_finite() -> None:
    student, teacher = make_logits("wide", 2, 40)
    student[0, :10], teacher[0, 5:20] = -INF, -INF
    for centred in (True, False):
        loss = fused_kd_loss(student, teacher, alpha=1.0, divergence=LogitMSE(centred), reduction="none")
        less = fused_kd_loss(
            student[:1, 20:], teacher[:1, 20:], alpha=1.0, divergence=LogitMSE(centred), reduction="none"
        )
        assert isinstance(loss, Tensor)
        torch.testing.assert_close(loss[:1], less)
    student[0] = -INF
    student[1, 3] = math.nan
    assert fused_kd_loss(student, teacher, alpha=1.0, divergence="logit_mse", reduction="none").isnan().all()  # type: ignore[union-attr]


FAMILIES: list[Family] = [
    Linear(0.0), Linear(0.5), Linear(0.9), Mixture(0.5, 0.5, 0.5), Mixture(0.1, 0.1, 0.9), Mixture(0.9, 0.0, 1.0),
    AlphaBetaFamily(0.5, 0.5), AlphaBetaFamily(2.0, 3.0), AlphaBetaFamily(0.01, 0.99), AlphaBetaFamily(0.1, 0.1),
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
@pytest.mark.parametrize(("degree", "closer", "bound"), [(5, 1, 1e-6), (6, 32, 5e-15)])
def test_what_is_fitted(degree: int, closer: int, bound: float, family: Family) -> None:
    reach = family.reach / closer
    polynomials = near(family, degree, reach)
    with localcontext(Context(prec=40)):
        exact: Any = type(family)(*map(Decimal, astuple(family)))  # type: ignore[call-overload]
        for i in range(1, 60):
            d = Decimal(reach) * (Decimal(2 * i) / 61 - 1)
            at = Columns(Decimal(1), d.exp(), Decimal(0), d, d, d.exp() - 1)
            base = exact.base(DECIMALS, at)
            for coefficients, value, power in zip(polynomials, exact.terms(DECIMALS, at), (2, 1), strict=True):
                fitted = sum(Decimal(c) * d**n for n, c in enumerate(coefficients)) * d**power * base
                assert abs(fitted / value - 1) < bound


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_terms_of_a_column(dtype: torch.dtype, bound: float, family: Family) -> None:
    """Near and far: no d has terms that cancel."""
    p = torch.full((400,), 0.25, dtype=dtype)
    d = torch.cat([sign * torch.logspace(-9, 0.3, 200, dtype=dtype) for sign in (-1, 1)])
    at = Columns(p, p * d.exp(), p.log(), p.log() + d, d, p * d.expm1())
    found = column_terms(family, at)
    with localcontext(Context(prec=40)):
        exact: Any = type(family)(*map(Decimal, astuple(family)))  # type: ignore[call-overload]
        for i, x in enumerate(map(Decimal, d.tolist())):
            of_p, log_p = Decimal("0.25"), Decimal("0.25").ln()
            column = Columns(of_p, of_p * x.exp(), log_p, log_p + x, x, of_p * (x.exp() - 1))
            for values, value in zip(found, exact.terms(DECIMALS, column), strict=True):
                assert abs(Decimal(float(values[i])) / value - 1) < bound


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SymmetricKL(1.5), ValueError, r"SymmetricKL: ratio must be in \[0, 1\], got 1.5"),
        (lambda: JSD(0.0), ValueError, r"JSD: beta must be between 0 and 1, got 0.0; TRL's beta=0 is ForwardKL\(\)"),
        (lambda: JSD(float("nan")), ValueError, "JSD: beta must be between 0 and 1, got nan"),
        (lambda: SkewKL("0.1"), TypeError, "SkewKL: alpha must be a number, got '0.1' of type str"),
        (lambda: AlphaDivergence(1.0), ValueError, r"AlphaDivergence: alpha must be .*; its limits are ForwardKL\(\)"),
        (lambda: AlphaBeta(0.0, 1.0), ValueError, "AlphaBeta: alpha must be between 0 and 100, got 0.0"),
        (lambda: LogitMSE(1), TypeError, "LogitMSE: centred must be True or False, got 1"),  # type: ignore[arg-type]
    ],
)
def test_parameters_are_checked(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_the_reference_of_the_loss_takes_them_too() -> None:
    student, teacher = (x.double() for x in make_logits("wide", 3, 50))
    torch.testing.assert_close(kd_loss(student, teacher, alpha=1.0, divergence="jsd"), 4 * soft_term("jsd", 2.0).mean())
