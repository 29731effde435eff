"""The ratio of the temperatures, and that of the hard term, from inputs where student and teacher agree.

Where the teacher's logits are r times the student's, r = teacher_temperature / temperature, both distributions are
the same, and no divergence has a gradient: what is left is the hard term's. At any other r something else is left. So
r, and the hard term's temperature, are found before the divergence is.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fused_kd.identification.hard import EXACT, Rows, hard_columns, solve
from fused_kd.identification.minimum import minimised

_RATIOS = [k / 2 for k in range(-14, 15)]  # their logarithms
_FINE = [k / 8 for k in range(-40, 41)]
_HARD = [k / 6 for k in range(-12, 31)]


class Agreement(NamedTuple):
    ratio: float  # of the teacher's temperature to the student's
    hard_temperature: float


def agreement(at: Callable[[float], tuple[Rows, Tensor]]) -> Agreement | None:
    """Of a loss of which `at(r)` gives rows with teacher logits that are r times the student's, and the gradient over
    them where the teacher's are 0."""
    seen = cache(at)

    def left(ratio: float, of_hard: Tensor) -> Tensor:
        """What is no hard term's, for hard terms at these temperatures, in units of what the teacher does: [K, R V], or
        [1, R V] without a hard term."""
        rows, without = seen(ratio)
        gradient = rows.gradient.flatten()[None]
        if rows.labels is not None:
            columns = torch.stack([x.flatten(1) for x in hard_columns(rows, of_hard)], -1)
            gradient = solve(columns, rows.gradient)[1] * rows.gradient.norm()
        return gradient / float((rows.gradient - without).norm().clamp(min=1e-300))

    def with_hard_at_1(numbers: Sequence[float]) -> Tensor:
        return left(math.exp(numbers[0]), torch.ones(1, dtype=torch.float64))[0]

    def with_any(numbers: Sequence[float]) -> Tensor:
        return left(math.exp(numbers[0]), torch.tensor(numbers[1:], dtype=torch.float64).exp())[0]

    def with_best(x: float) -> list[float]:
        start = _HARD[int(left(math.exp(x), hard).norm(dim=-1).argmin())]
        return [x, *minimised(lambda numbers: with_any([x, *numbers]), [start], steps=10, limit=9)]

    hard = torch.tensor(_HARD, dtype=torch.float64).exp()
    stages = [(with_hard_at_1, lambda x: [x], _RATIOS)]
    if seen(1.0)[0].labels is not None:
        stages.append((with_any, with_best, _FINE))
    for residual, start_at, ratios in stages:
        starts = [(float(residual(numbers).norm()), numbers) for numbers in map(start_at, ratios)]
        # (A divergence that grows with the teacher's logits makes it small at large ratios too: so all minima.)
        minima = [b for a, b, c in zip(starts, starts[1:], starts[2:], strict=False) if b[0] <= min(a[0], c[0])]
        for _, start in sorted(minima)[:4]:
            ratio, *of_hard = minimised(residual, start, steps=80, limit=9, rest=1e-4)
            if residual([ratio, *of_hard]).norm() < EXACT:
                return Agreement(math.exp(ratio), math.exp(*of_hard) if of_hard else 1.0)
    return None
