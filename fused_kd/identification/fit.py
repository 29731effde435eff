"""Which divergence, at which temperatures and with which weights, has a given gradient.

The gradient of a row is linear in what the terms weigh, and in the two halves of those divergences that are mixtures of
two. So for given temperatures and a given parameter of the divergence the weights are a least-squares problem, and what
is left of the gradient says how good these are: a search in one to three numbers (the ratio of the temperatures is
known: `agreement.py`), on a grid and then by Gauss and Newton as Levenberg and Marquardt have it. In float64 the right
answer leaves 1e-13, a wrong one 1e-3 to 1e-6.
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
from fused_kd.identification.agreement import Agreement
from fused_kd.identification.hard import EXACT, Rows, hard_columns, nice, read_hard, solve
from fused_kd.identification.minimum import minimised
from fused_kd.reference import divergence_terms, mean_squared_difference


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
    Shape("alpha and alpha-beta divergences", lambda alpha, beta: [AlphaBeta(alpha, beta)], _POWERS),
]
_VARIATION = Shape("total variation", lambda: [TotalVariation()])
MSE = "mean squared differences of logits"


def fit(rows: Rows, agreement: Agreement) -> tuple[Fit | None, list[str]]:
    """The simplest that has the gradient; and, where there is none, what was ruled out."""
    found = _fit_mse(rows, agreement.hard_temperature)
    logs = torch.linspace(math.log(0.05), math.log(1000), 80, dtype=torch.float64)[:, None]

    def temperatures(logs: Tensor) -> Tensor:
        student = logs[:, 0].exp()
        return torch.stack([student, student * agreement.ratio, student * 0 + agreement.hard_temperature], -1)

    for shape in SHAPES:
        found = found or _fit_shape(rows, shape, logs, temperatures)
    return found, [shape.name for shape in SHAPES] + [MSE]


def fit_variation(rows: Rows) -> Fit | None:
    """The total variation: it has no agreement, for its gradient jumps there."""
    grid = torch.linspace(math.log(0.3), math.log(150), 50, dtype=torch.float64)
    pairs = torch.cat([torch.cartesian_prod(grid, grid), grid.repeat_interleave(10)[:, None].expand(-1, 2)])
    triples = torch.cat([torch.cat([pairs, pairs[:, :1] + math.log(share)], -1) for share in (1.0, 0.5, 0.2)])

    def with_hard_at_1(logs: Tensor) -> Tensor:
        return torch.cat([logs.exp(), torch.ones_like(logs[:, :1])], -1)

    found = _fit_shape(rows, _VARIATION, pairs, with_hard_at_1)
    return found or (_fit_shape(rows, _VARIATION, triples, torch.exp) if rows.labels is not None else None)


def fit_hard(rows: Rows) -> Fit | None:
    """A loss without a soft term."""

    def left(numbers: Sequence[float]) -> tuple[Tensor, Tensor]:
        columns = hard_columns(rows, torch.tensor(numbers, dtype=torch.float64).exp())
        weights, residual = solve(torch.stack([x.flatten(1) for x in columns], -1), rows.gradient)
        return weights[0], residual[0]

    for start in (1.0, 0.4, 3.0, 10.0):
        numbers = [0.0] if start == 1 else minimised(lambda x: left(x)[1], [math.log(start)])
        weights, residual = left(numbers)
        if residual.norm() < EXACT:
            temperature = nice(math.exp(numbers[0]))
            hard, smoothing, problem = read_hard(weights.tolist(), temperature, rows.student.shape[-1])
            return Fit(1.0, 1.0, None, 0.0, hard, temperature, smoothing, problem)
    return None


def weights_of(rows: Rows, fitted: Fit) -> tuple[float, float, float]:
    """Of the soft and the hard term, and what is left, for other rows than those it was fitted to."""
    columns = []
    if fitted.divergence is not None:
        temperatures = torch.tensor([[fitted.temperature, fitted.teacher_temperature]], dtype=torch.float64)
        columns.append(_soft_gradient(rows, temperatures, fitted.divergence)[0])
    if rows.labels is not None and fitted.hard:
        q, own, one = hard_columns(rows, torch.tensor([fitted.hard_temperature], dtype=torch.float64))
        smoothing = fitted.label_smoothing
        columns.append((q - (1 - smoothing) * own - smoothing * one / rows.student.shape[-1])[0])
        columns[-1] /= fitted.hard_temperature
    weights, residual = solve(torch.stack([x.flatten() for x in columns], -1)[None], rows.gradient)
    both = weights[0].tolist()
    soft = both.pop(0) if fitted.divergence is not None else 0.0
    return soft, both[0] if both else 0.0, float(residual[0].norm())


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


def _columns(rows: Rows, shape: Shape, temperatures: Tensor, parameters: Sequence[float]) -> Tensor:
    """For temperatures [K, 3] of the student, the teacher and the hard term."""
    parts = [_soft_gradient(rows, temperatures[:, :2], part) for part in shape.parts(*parameters)]
    if rows.labels is not None:
        parts += hard_columns(rows, temperatures[:, 2])
    return torch.stack([x.flatten(1) for x in parts], -1)


def _fit_shape(rows: Rows, shape: Shape, logs: Tensor, temperatures: Callable[[Tensor], Tensor]) -> Fit | None:
    """`temperatures` makes of numbers [K, n], from a grid `logs`, those of student, teacher and hard term: [K, 3]."""
    count = logs.shape[-1]

    def solved(triples: Tensor, parameters: Sequence[float]) -> tuple[Tensor, Tensor]:
        return solve(_columns(rows, shape, triples, parameters), rows.gradient)

    def solved_at(numbers: Sequence[float]) -> tuple[Tensor, Tensor]:
        weights, left = solved(torch.tensor([numbers[:3]], dtype=torch.float64), numbers[3:])
        return weights[0], left[0]

    def numbers_of(unbounded: Sequence[float]) -> list[float]:
        triple = temperatures(torch.tensor([unbounded[:count]], dtype=torch.float64))[0]
        return [*triple.tolist(), *shape.parameters(unbounded[count:])]

    starts = []
    for parameters in shape.starts:
        left = solved(temperatures(logs), parameters)[1].norm(dim=-1)
        for k in left.argsort()[:3].tolist():
            starts.append((float(left[k]), [*logs[k].tolist(), *shape.within(parameters)]))
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
        hard, smoothing, problem = read_hard(weights[count:], hard_temperature, rows.student.shape[-1])
        why_not = why_not or problem
    return Fit(temperature, teacher_temperature, divergence, soft, hard, hard_temperature, smoothing, why_not)


def _fit_mse(rows: Rows, hard_temperature: float) -> Fit | None:
    """Its gradient is linear in both logits: their temperatures are in the weights, and only their ratio matters."""
    for centred in (True, False):
        size = rows.student.shape[-1]
        both = [x - x.mean(-1, keepdim=True) * centred for x in (rows.student, rows.teacher)]
        of_hard = torch.tensor([hard_temperature], dtype=torch.float64)
        hard = list(hard_columns(rows, of_hard)) if rows.labels is not None else []
        columns = torch.stack([x.flatten() for x in (*both, *hard)], -1)[None]
        weights, residual = solve(columns, rows.gradient)
        of_s, of_t, *others = weights[0].tolist()
        if residual[0].norm() < EXACT and of_s > 0 > of_t:
            own, smoothing, problem = read_hard(others, hard_temperature, size) if others else (0.0, 0.0, "")
            ratio = nice(-of_s / of_t)
            return Fit(1.0, ratio, LogitMSE(centred), of_s * size, own, hard_temperature, smoothing, problem)
    return None
