"""The ratio of the temperatures, and that of the hard term, from inputs where student and teacher agree.

Where the teacher's logits are r times the student's, r = teacher_temperature / temperature, both distributions are the
same, and no divergence has a gradient: what is left is the hard term's. At any other r something else is left. So r, and
the hard term's temperature, are found before the divergence is.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_kd.identification.hard import EXACT, Rows, hard_columns, solve
from fused_kd.identification.minimum import minimised

_RATIOS = torch.linspace(-7, 7, 29).exp().tolist()
_HARD = torch.linspace(-2, 5, 15, dtype=torch.float64).exp()


class Agreement(NamedTuple):
    ratio: float  # of the teacher's temperature to the student's
    hard_temperature: float


def agreement(at: Callable[[float], tuple[Rows, Tensor]]) -> Agreement | None:
    """Of a loss of which `at(r)` gives rows with teacher logits that are r times the student's, and the gradient over
    them where the teacher's are 0."""

    def left(ratio: float, of_hard: Tensor) -> Tensor:
        """For hard terms at these temperatures, [K, R V]: the gradient that is none of theirs, in units of what the
        teacher does to it."""
        rows, without = at(ratio)
        gradient = rows.gradient.flatten()[None]
        if rows.labels is not None:
            columns = torch.stack([x.flatten(1) for x in hard_columns(rows, of_hard)], -1)
            gradient = solve(columns, rows.gradient)[1] * rows.gradient.norm()
        return gradient / (rows.gradient - without).norm().clamp(min=1e-300)

    def ratio_alone(numbers: Sequence[float]) -> Tensor:
        return left(math.exp(numbers[0]), torch.ones(1, dtype=torch.float64))[0]

    def both(numbers: Sequence[float]) -> Tensor:
        return left(math.exp(numbers[0]), torch.tensor(numbers[1:], dtype=torch.float64).exp())[0]

    grid = [(ratio, left(ratio, _HARD).norm(dim=-1)) for ratio in _RATIOS]
    one = int((_HARD - 1).abs().argmin())
    for ratio, _ in sorted(grid, key=lambda pair: float(pair[1][min(one, len(pair[1]) - 1)]))[:3]:
        numbers = minimised(ratio_alone, [math.log(ratio)], limit=9)
        if ratio_alone(numbers).norm() < EXACT:
            return Agreement(math.exp(numbers[0]), 1.0)
    starts = [(float(x), math.log(r), float(h.log())) for r, of_r in grid for x, h in zip(of_r, _HARD, strict=False)]
    for _, *start in sorted(starts)[:6] if len(grid[0][1]) > 1 else []:
        numbers = minimised(both, start, limit=9)
        if both(numbers).norm() < EXACT:
            return Agreement(math.exp(numbers[0]), math.exp(numbers[1]))
    return None
