"""The families that divergences belong to: the mathematics of a column.

With d = log q - log p, a divergence is a sum over columns of v(p, q, d) >= 0, which do not cancel, and its gradient is

    dD/ds_j = (c_j - q_j G) / tau        c = q dv/dq        G = sum c

so a row is visited once for Z_s and Z_t, which make p, q and d of a column, and once more for the sums of v and c.
For one base of a column, p or a product of powers of p and q,

    v = base f(d)    c = base g(d)       f(0) = f'(0) = g(0) = 0

Where |d| is small, within the family's `reach`, the expressions of v and c cancel: there f(d) / d^2 and g(d) / d are
polynomials, fitted to 40 digits of the same expressions.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import astuple, dataclass
from decimal import Context, Decimal, localcontext
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor


class Arithmetic(NamedTuple):
    """What the expressions below need of the numbers that they are given: tensors, or decimals of 40 digits."""

    exp: Callable[[Any], Any]
    expm1: Callable[[Any], Any]
    log1p: Callable[[Any], Any]
    absolute: Callable[[Any], Any]
    smaller: Callable[[Any, Any], Any]
    where: Callable[[Any, Any, Any], Any]
    zero: Any

    def times(self, x: Any, y: Any) -> Any:
        """x y, and 0 where x is 0: 0 log 0 = 0."""
        return self.where(x == 0, self.zero, x * y)


TENSORS = Arithmetic(torch.exp, torch.expm1, torch.log1p, torch.abs, torch.minimum, torch.where, 0.0)
DECIMALS = Arithmetic(
    Decimal.exp,
    lambda x: x.exp() - 1,
    lambda x: (1 + x).ln(),
    abs,
    min,
    lambda condition, x, y: x if condition else y,
    Decimal(0),
)


class Columns(NamedTuple):
    """What is known of columns: tensors of one shape, or decimals."""

    p: Any
    q: Any
    log_p: Any
    log_q: Any
    d: Any  # log q - log p, without the cancellation
    difference: Any  # q - p, likewise


class Family(Hashable, Protocol):
    """A frozen dataclass of its parameters: floats, or decimals."""

    @property
    def reach(self) -> float:
        """Below this |d| a column is near; 0 for a family that has no such case."""

    @property
    def degree(self) -> int:
        """Of the polynomials that leave float32 what it can hold."""

    def base(self, x: Arithmetic, at: Columns) -> Any: ...

    def terms(self, x: Arithmetic, at: Columns) -> tuple[Any, Any]:
        """v and c where the column is not near."""


@dataclass(frozen=True)
class Linear:
    """forward KL(p || q) + (1 - forward) KL(q || p)."""

    forward: Any
    reach: ClassVar[float] = 0.25
    degree: ClassVar[int] = 4

    def base(self, x: Arithmetic, at: Columns) -> Any:
        return at.p

    def terms(self, x: Arithmetic, at: Columns) -> tuple[Any, Any]:
        reverse = x.times((1 - self.forward) * at.q, at.d)
        v = reverse - x.times(self.forward * at.p, at.d) + (2 * self.forward - 1) * at.difference
        return v, self.forward * at.difference + reverse


@dataclass(frozen=True)
class Mixture:
    """of_p KL(p || m) + of_q KL(q || m), m = share p + (1 - share) q."""

    share: Any
    of_p: Any
    of_q: Any
    reach: ClassVar[float] = 0.5
    degree: ClassVar[int] = 5

    @property
    def level(self) -> Any:
        """What makes f'(0) = 0; itself 0 where the two balance, as for JSD."""
        return self.of_p * (1 - self.share) - self.of_q * self.share

    def base(self, x: Arithmetic, at: Columns) -> Any:
        return at.p

    def terms(self, x: Arithmetic, at: Columns) -> tuple[Any, Any]:
        p, q, d, zero = at.p, at.q, at.d, at.p * 0
        share_of_smaller = x.where(d > 0, zero + self.share, zero + 1 - self.share)
        less = share_of_smaller * x.expm1(-x.absolute(d))
        w, log_w = 1 + less, x.log1p(less)  # w = m / max(p, q)
        of_p = x.times(self.of_p * p, x.smaller(-d, zero) - log_w)
        of_q = x.times(self.of_q * q, x.smaller(d, zero) - log_w)
        return of_p + of_q + self.level * at.difference, of_q + self.level * (q - x.smaller(p, q) / w)


@dataclass(frozen=True)
class AlphaBetaFamily:
    """-1 / (a b) sum (p^a q^b - (a p^k + b q^k) / k), k = a + b."""

    a: Any
    b: Any
    degree: ClassVar[int] = 5

    @property
    def reach(self) -> float:
        return 0.5 / float(max(self.a, self.b))

    def base(self, x: Arithmetic, at: Columns) -> Any:
        return x.exp(self.a * at.log_p + self.b * at.log_q)

    def terms(self, x: Arithmetic, at: Columns) -> tuple[Any, Any]:
        # Powers of p and q may count where p and q are too small for float32.
        a, b, k = self.a, self.b, self.a + self.b
        of_p, of_q, both = (x.exp(log) for log in (k * at.log_p, k * at.log_q, a * at.log_p + b * at.log_q))

        def less_both(power: Any, log_ratio: Any) -> Any:
            """power - both, where power = both exp(log_ratio)."""
            return x.where(x.absolute(log_ratio) < 1, both * x.expm1(log_ratio), power - both)

        v_p, v_q = less_both(of_p, -b * at.d) / b, less_both(of_q, a * at.d) / a
        return (v_p + v_q) / k, v_q


@dataclass(frozen=True)
class Variation:
    """sum |p - q| / 2."""

    reach: ClassVar[float] = 0.0
    degree: ClassVar[int] = 0

    def base(self, x: Arithmetic, at: Columns) -> Any:
        return at.p

    def terms(self, x: Arithmetic, at: Columns) -> tuple[Any, Any]:
        half = at.q / 2
        return x.absolute(at.difference) / 2, x.where(at.d > 0, half, x.where(at.d < 0, -half, half * 0))


def column_terms(family: Family, at: Columns) -> tuple[Tensor, Tensor]:
    """v and c of columns."""
    d = torch.where(at.d.isnan() & (at.p == 0), 0.0, at.d)  # -inf in both
    at = at._replace(d=d)
    v, c = family.terms(TENSORS, at)
    if not family.reach:
        return v, c
    reach, degree = family.reach, family.degree
    if d.dtype == torch.float64:  # the expressions lose little until much closer to 0
        reach, degree = reach / 32, 6
    of_value, of_gradient = near(family, degree, reach)
    is_near, linear = d.abs() < reach, family.base(TENSORS, at) * d
    v = torch.where(is_near, linear * d * _polynomial(of_value, d), v)
    return v, torch.where(is_near, linear * _polynomial(of_gradient, d), c)


def kernel_numbers(family: Family) -> tuple[float, ...]:
    """What a kernel takes of a family: its parameters, filled up to three; the reach; and of `near` in the family's
    degree the coefficients of f(d) / d^2 and of g(d) / d, filled up to six each."""

    def filled(values: tuple[float, ...], number: int) -> tuple[float, ...]:
        return (*values, *(0.0,) * (number - len(values)))

    parameters = tuple(map(float, astuple(family)))  # type: ignore[call-overload]
    of_value, of_gradient = near(family, family.degree, family.reach) if family.reach else ((), ())
    return (*filled(parameters, 3), family.reach, *filled(of_value, 6), *filled(of_gradient, 6))


def _polynomial(coefficients: tuple[float, ...], d: Tensor) -> Tensor:
    result = torch.full_like(d, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = result.mul_(d).add_(coefficient)
    return result


@lru_cache(maxsize=64)
def near(family: Family, degree: int, reach: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The coefficients, the lowest first, of f(d) / d^2 and g(d) / d within the reach: least squares of the relative
    error at Chebyshev's points."""
    points = 2 * degree + 10
    with localcontext(Context(prec=40)):
        exact: Family = type(family)(*map(Decimal, astuple(family)))  # type: ignore[call-overload]
        at = [Decimal(reach * math.cos(math.pi * (i + 0.5) / points)) for i in range(points)]
        one, zero = Decimal(1), Decimal(0)
        columns = [Columns(one, d.exp(), zero, d, d, d.exp() - 1) for d in at]
        terms = [(*exact.terms(DECIMALS, column), exact.base(DECIMALS, column)) for column in columns]
        of_value = [float(v / base / d**2) for (v, _, base), d in zip(terms, at, strict=True)]
        of_gradient = [float(c / base / d) for (_, c, base), d in zip(terms, at, strict=True)]
    return _fitted(at, of_value, degree), _fitted(at, of_gradient, degree)


def _fitted(at: list[Decimal], values: list[float], degree: int) -> tuple[float, ...]:
    x = torch.tensor([float(d) for d in at], dtype=torch.float64, device="cpu")
    y = torch.tensor(values, dtype=torch.float64, device="cpu")
    reach = float(x.abs().max())
    powers = (x / reach).unsqueeze(1) ** torch.arange(degree + 1, dtype=torch.float64, device="cpu")
    solution = torch.linalg.lstsq(powers / y.unsqueeze(1), torch.ones_like(y).unsqueeze(1)).solution.squeeze(1)
    return tuple(float(value) / reach**i for i, value in enumerate(solution))
