"""The ratio of the temperatures, and that of the hard term, from inputs where student and teacher agree.

Where the teacher's logits are r times the student's, r = teacher_temperature / temperature, both distributions are
the same, and no divergence has a gradient: what is left is the hard term's. At any other r something else is left. So r,
and the hard term's temperature, are found before the divergence is.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fused_kd.identification.hard import EXACT, Rows, hard_columns, solve
from fused_kd.identification.minimum import minimised

_RATIOS = [k / 2 for k in range(-14, 15)]  # their logarithms
_HARD = [k / 3 for k in range(-6, 16)]


class Agreement(NamedTuple):
    ratio: float  # of the teacher's temperature to the student's
    hard_temperature: float


def agreement(at: Callable[[float], tuple[Rows, float]]) -> Agreement | None:
    """Of a loss of which `at(r)` gives rows with teacher logits that are r times the student's, and how large these are
    in units of what they are at small r."""
    seen = lru_cache(at)
    without = seen(math.exp(_RATIOS[0]))[0].gradient  # the teacher's are next to 0
    size = max(float((seen(math.exp(x))[0].gradient - without).norm() / seen(math.exp(x))[1]) for x in _RATIOS[1:])
    if not size:
        return None

    def left(ratio: float, of_hard: Tensor) -> Tensor:
        """What is no hard term's, for hard terms at these temperatures: [K, R V], or [1, R V] without one."""
        rows, scale = seen(ratio)
        gradient = rows.gradient.flatten()[None]
        if rows.labels is not None:
            columns = torch.stack([x.flatten(1) for x in hard_columns(rows, of_hard)], -1)
            gradient = solve(columns, rows.gradient)[1] * rows.gradient.norm()
        return gradient / (scale * size)

    def with_hard_at_1(numbers: Sequence[float]) -> Tensor:
        return left(math.exp(numbers[0]), torch.ones(1, dtype=torch.float64))[0]

    def with_any(numbers: Sequence[float]) -> Tensor:
        return left(math.exp(numbers[0]), torch.tensor(numbers[1:], dtype=torch.float64).exp())[0]

    starts = sorted((float(with_hard_at_1([x]).norm()), [x]) for x in _RATIOS)[:3]
    tries = [(with_hard_at_1, start) for _, start in starts]
    if seen(1.0)[0].labels is not None:
        hard = torch.tensor(_HARD, dtype=torch.float64).exp()
        grid = [(x, left(math.exp(x), hard).norm(dim=-1)) for x in _RATIOS]
        starts = sorted((float(of_x.min()), [x, _HARD[int(of_x.argmin())]]) for x, of_x in grid)[:5]
        tries += [(with_any, start) for _, start in starts]
    for residual, start in tries:
        ratio, *of_hard = minimised(residual, start, limit=9)
        if residual([ratio, *of_hard]).norm() < EXACT:
            return Agreement(math.exp(ratio), math.exp(*of_hard) if of_hard else 1.0)
    return None
