"""Which divergence, at which temperatures and with which weights, has a given gradient.

The gradient of a row is linear in what the terms weigh, and in the two halves of those divergences that are mixtures of
two. So for given temperatures and a given parameter of the divergence the weights are a least-squares problem, and what
is left of the gradient says how good these are: a search in two to four numbers, on a grid and then by Gauss and Newton
as Levenberg and Marquardt have it. In float64 the right answer leaves 1e-13, a wrong one 1e-3 to 1e-6.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_kd.divergences import (
    JSD,
    AlphaBeta,
    AlphaDivergence,
    Divergence,
    ForwardKL,
    LogitMSE,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    SymmetricKL,
    TotalVariation,
)
from fused_kd.identification.minimum import minimised
from fused_kd.reference import divergence_terms, mean_squared_difference

EXACT = 1e-9  # what is left of a gradient, in units of it, when the answer is right

_COLDEST, _HOTTEST = 0.35, 30.0  # of the grid
_SHARES_OF_HARD = (1.0, 0.5, 0.2)  # of the student's temperature in the soft term, where that of the hard one is free


@dataclass(frozen=True)
class Rows:
    """Rows of which every one counts, with the gradient of the loss's sum: [R, V], labels [R] (None: not used)."""

    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    gradient: Tensor


@dataclass(frozen=True)
class Fit:
    """gradient = soft * d divergence / ds + hard * d cross entropy / ds, for every row."""

    temperature: float
    teacher_temperature: float
    divergence: Divergence | None  # None: no soft term, or none that is among them
    soft: float
    hard: float
    hard_temperature: float
    label_smoothing: float
    why_not: str = ""  # what fits, but is no option of the loss


@dataclass(frozen=True)
class Shape:
    """Divergences that differ in parameters; the soft term is one of them, or is summed from two."""

    name: str
    parts: Callable[..., list[Divergence]]  # of the parameters
    starts: Sequence[tuple[float, ...]] = ((),)  # of the search in them: shares between 0 and 1, or any above 0
    shares: bool = False
    temperatures: int = 9  # in the grid of each; the total variation's gradient jumps where p = q, so it needs more

    def within(self, parameters: Sequence[float]) -> list[float]:
        """Without bounds, for the search."""
        return [math.log(x / (1 - x)) if self.shares else math.log(x) for x in parameters]

    def parameters(self, unbounded: Sequence[float]) -> list[float]:
        return [1 / (1 + math.exp(-x)) if self.shares else math.exp(x) for x in unbounded]

    def whole(self, parameters: Sequence[float], weights: list[float]) -> tuple[Divergence | None, float]:
        """The divergence that the parts make with these weights, and its own."""
        divergence, weight = self.parts(*parameters)[0], sum(weights)
        if len(weights) == 2:
            forward, reverse = weights
            ratio = nice(forward / weight)
            if _small(reverse, forward) or _small(forward, reverse):
                divergence = ReverseKL() if _small(forward, reverse) else ForwardKL()
            else:
                return (SymmetricKL(ratio) if 0 < ratio < 1 else None), weight
        elif isinstance(divergence, AlphaBeta) and abs(divergence.alpha + divergence.beta - 1) < 1e-8:
            divergence = AlphaDivergence(divergence.beta)
        return divergence, weight


_SHARES = [(share,) for share in (0.03, 0.15, 0.5, 0.85, 0.97)]
_POWERS = [(alpha, beta) for alpha in (0.15, 0.6, 1.4) for beta in (0.15, 0.6, 1.4)]

SHAPES = [
    Shape("KL, reverse KL and both in any proportion", lambda: [ForwardKL(), ReverseKL()]),
    Shape("Jensen-Shannon divergences", lambda beta: [JSD(beta)], _SHARES, shares=True),
    Shape("skew KL", lambda alpha: [SkewKL(alpha)], _SHARES, shares=True),
    Shape("skew reverse KL", lambda alpha: [SkewReverseKL(alpha)], _SHARES, shares=True),
    Shape("total variation", lambda: [TotalVariation()], temperatures=40),
    Shape("alpha and alpha-beta divergences", lambda alpha, beta: [AlphaBeta(alpha, beta)], _POWERS),
]
MSE = "mean squared differences of logits"


def fit(rows: Rows, has_soft: bool) -> tuple[Fit | None, list[str]]:
    """The simplest that has the gradient; and, where there is none, what was ruled out."""
    if not has_soft:
        return _fit_hard(rows), []
    found = _fit_mse(rows)
    for hard_is_free in (False, True) if rows.labels is not None else (False,):
        for shape in SHAPES:
            found = found or _fit_shape(rows, shape, hard_is_free)
    return found, [shape.name for shape in SHAPES] + [MSE]


def weights_of(rows: Rows, fitted: Fit) -> tuple[float, float, float]:
    """Of the soft and the hard term, and what is left, for other rows than those it was fitted to."""
    columns = []
    if fitted.divergence is not None:
        temperatures = torch.tensor([[fitted.temperature, fitted.teacher_temperature]], dtype=torch.float64)
        columns.append(_soft_gradient(rows, temperatures, fitted.divergence)[0])
    if rows.labels is not None and fitted.hard:
        q, own, one = _hard_columns(rows, torch.tensor([fitted.hard_temperature], dtype=torch.float64))
        smoothing = fitted.label_smoothing
        columns.append((q - (1 - smoothing) * own - smoothing * one / rows.student.shape[-1])[0])
        columns[-1] /= fitted.hard_temperature
    weights, residual = _solve(torch.stack([x.flatten() for x in columns], -1)[None], rows.gradient)
    both = weights[0].tolist()
    soft = both.pop(0) if fitted.divergence is not None else 0.0
    return soft, both[0] if both else 0.0, float(residual[0].norm())


def nice(x: float, within: float = 3e-9) -> float:
    """The shortest decimal within rounding of it; itself where there is none."""
    for digits in range(1, 9):
        short = float(f"{x:.{digits}g}")
        if abs(short - x) <= (within if digits < 5 else 1e-10) * abs(x):  # many digits are near any number
            return short
    inverse = 1 / x if x else 0.0
    for digits in range(1, 5):  # 1/3, 1/7
        short = float(f"{inverse:.{digits}g}")
        if short and abs(1 / short - x) <= within * abs(x):
            return 1 / short
    return x


def _small(x: float, beside: float) -> bool:
    return abs(x) < 1e-8 * abs(beside)


def _soft_gradient(rows: Rows, temperatures: Tensor, divergence: Divergence) -> Tensor:
    """For temperatures [K, 2] of student and teacher: [K, R, V]."""
    tau, tau_t = temperatures[:, :1, None], temperatures[:, 1:, None]
    with torch.enable_grad():
        student = rows.student.detach().expand(len(temperatures), -1, -1).clone().requires_grad_()
        if isinstance(divergence, LogitMSE):
            total = mean_squared_difference(student / tau, rows.teacher / tau_t, divergence.centred).sum()
        else:
            log_p, log_q = torch.log_softmax(rows.teacher / tau_t, -1), torch.log_softmax(student / tau, -1)
            total = divergence_terms(log_p, log_q, divergence).sum()
        (gradient,) = torch.autograd.grad(total, student)
    return gradient


def _hard_columns(rows: Rows, temperatures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of a cross entropy is of these, for temperatures [K]: [K, R, V] each."""
    assert rows.labels is not None
    q = torch.softmax(rows.student / temperatures[:, None, None], -1)
    own = torch.nn.functional.one_hot(rows.labels, rows.student.shape[-1]).double().expand_as(q)
    return q, own, torch.ones_like(q)


def _solve(columns: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [K, m] of columns [K, R V, m], and what is left of the gradient in units of its norm: [K, R V]."""
    scale = columns.norm(dim=1, keepdim=True).clamp(min=1e-300)
    target = (gradient / gradient.norm()).flatten()[None, :, None].expand(len(columns), -1, 1)
    weights = torch.linalg.lstsq(columns / scale, target).solution
    left = (columns / scale) @ weights - target
    return (weights[..., 0] / scale[:, 0]) * gradient.norm(), left[..., 0]


def _columns(rows: Rows, shape: Shape, temperatures: Tensor, parameters: Sequence[float]) -> Tensor:
    """For temperatures [K, 3] of the student, the teacher and the hard term."""
    parts = [_soft_gradient(rows, temperatures[:, :2], part) for part in shape.parts(*parameters)]
    if rows.labels is not None:
        parts += _hard_columns(rows, temperatures[:, 2])
    return torch.stack([x.flatten(1) for x in parts], -1)


def _fit_shape(rows: Rows, shape: Shape, hard_is_free: bool) -> Fit | None:
    """`hard_is_free`: the temperature of the hard term is looked for too; it is 1 otherwise."""
    ends = math.log(_COLDEST), math.log(_HOTTEST)
    grid = torch.linspace(*ends, shape.temperatures, dtype=torch.float64)
    same = torch.linspace(*ends, 10 * shape.temperatures, dtype=torch.float64)
    pairs = torch.cat([torch.cartesian_prod(grid, grid), torch.stack([same, same], -1)]).exp()
    if hard_is_free:
        triples = torch.cat([torch.cat([pairs, share * pairs[:, :1]], -1) for share in _SHARES_OF_HARD])
    else:
        triples = torch.cat([pairs, torch.ones_like(pairs[:, :1])], -1)
    free = 2 + hard_is_free  # temperatures that are looked for

    def solved(temperatures: Tensor, parameters: Sequence[float]) -> tuple[Tensor, Tensor]:
        return _solve(_columns(rows, shape, temperatures, parameters), rows.gradient)

    def solved_at(numbers: Sequence[float]) -> tuple[Tensor, Tensor]:
        weights, left = solved(torch.tensor([numbers[:3]], dtype=torch.float64), numbers[3:])
        return weights[0], left[0]

    def numbers_of(unbounded: Sequence[float]) -> list[float]:
        of_hard = [] if hard_is_free else [1.0]
        return [*map(math.exp, unbounded[:free]), *of_hard, *shape.parameters(unbounded[free:])]

    starts = []
    for parameters in shape.starts:
        left = solved(triples, parameters)[1].norm(dim=-1)
        for k in left.argsort()[:6].tolist():
            starts.append((float(left[k]), [*triples[k, :free].log().tolist(), *shape.within(parameters)]))
    for _, start in sorted(starts)[:6]:
        numbers = numbers_of(minimised(lambda x: solved_at(numbers_of(x))[1], start))
        weights, left = solved_at(numbers)
        if left.norm() < EXACT:
            # At a high temperature some of them hardly matter. So short ones are tried in their place.
            student, *others = (nice(x, 1e-6) for x in numbers)
            short = [student, *(student if abs(x / student - 1) < 1e-6 else x for x in others[:2]), *others[2:]]
            again, left = solved_at(short)
            if left.norm() < 1e-11:
                numbers, weights = short, again
            return _read(rows, shape, numbers, weights.tolist())
    return None


def _read(rows: Rows, shape: Shape, numbers: Sequence[float], weights: list[float]) -> Fit:
    temperature, teacher_temperature, hard_temperature, *parameters = map(nice, numbers)
    count = len(shape.parts(*parameters))
    divergence, soft = shape.whole(parameters, weights[:count])
    why_not = "" if divergence is not None else f"{shape.name}, but in proportions that none of them has"
    hard, smoothing = 0.0, 0.0
    if rows.labels is not None:
        hard, smoothing, problem = _read_hard(weights[count:], hard_temperature, rows.student.shape[-1])
        why_not = why_not or problem
    return Fit(temperature, teacher_temperature, divergence, soft, hard, hard_temperature, smoothing, why_not)


def _read_hard(weights: list[float], temperature: float, vocabulary: int) -> tuple[float, float, str]:
    """Weight and label smoothing of a cross entropy that has these weights of its columns."""
    of_q, of_own, of_one = weights
    smoothing = 1 + of_own / of_q if of_q else 0.0
    smoothing = 0.0 if abs(smoothing) < 1e-7 else nice(smoothing)
    consistent = abs(of_one * vocabulary + smoothing * of_q) < 1e-6 * abs(of_q)
    problem = "" if consistent and 0 <= smoothing <= 1 else "a term that depends on labels, but is no cross entropy"
    return of_q * temperature, smoothing, problem


def _fit_mse(rows: Rows) -> Fit | None:
    """Its gradient is linear in both logits: their temperatures are in the weights, and only their ratio matters."""
    for centred in (True, False):
        size = rows.student.shape[-1]
        both = [x - x.mean(-1, keepdim=True) * centred for x in (rows.student, rows.teacher)]
        hard = list(_hard_columns(rows, torch.ones(1, dtype=torch.float64))) if rows.labels is not None else []
        columns = torch.stack([x.flatten() for x in (*both, *hard)], -1)[None]
        weights, residual = _solve(columns, rows.gradient)
        of_s, of_t, *others = weights[0].tolist()
        if residual[0].norm() < EXACT and of_s > 0 > of_t:
            own, smoothing, problem = _read_hard(others, 1.0, size) if others else (0.0, 0.0, "")
            ratio = nice(-of_s / of_t)
            return Fit(1.0, ratio, LogitMSE(centred), of_s * size, own, 1.0, smoothing, problem)
    return None


def _fit_hard(rows: Rows) -> Fit | None:
    def left(numbers: Sequence[float]) -> tuple[Tensor, Tensor]:
        columns = _hard_columns(rows, torch.tensor(numbers, dtype=torch.float64).exp())
        weights, residual = _solve(torch.stack([x.flatten(1) for x in columns], -1), rows.gradient)
        return weights[0], residual[0]

    if rows.labels is None:
        return None
    for start in (1.0, 0.4, 3.0, 10.0):
        numbers = [0.0] if start == 1 else minimised(lambda x: left(x)[1], [math.log(start)])
        weights, residual = left(numbers)
        if residual.norm() < EXACT:
            temperature = nice(math.exp(numbers[0]))
            hard, smoothing, problem = _read_hard(weights.tolist(), temperature, rows.student.shape[-1])
            return Fit(1.0, 1.0, None, 0.0, hard, temperature, smoothing, problem)
    return None
