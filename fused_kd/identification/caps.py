"""Softcaps of a loss's logits, z = softcap tanh(scale x / softcap), from what a softmax of z does not change with.

A softmax is the same when one number is added to all z of a row. So the gradient over the student's z adds up to 0 in
every row, and teacher logits that are moved so that their z move by one number change nothing:

    sum_j g_j cosh^2(r x_j) = 0,        tanh(r x_j) -> tanh(r x_j) - tanh(r min_k x_k),        r = scale / softcap.

Each of the two holds at one r alone, whatever the divergence, the temperatures, the weights and the labels are. With
that r, tanh(r x) / r are the logits of a loss without softcaps.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fused_kd.identification.minimum import minimised

_HOLDS = 1e-9  # what the sides of an equation may differ by, in units of its terms
_RATES = [2.0**k for k in range(-11, 3)]  # softcaps of 2048 to 1/4, where the scale is 1


def uncapped(logits: Tensor, rate: float) -> Tensor:
    """The logits that a loss without softcaps would have; `rate` 0: they have none."""
    return torch.tanh(rate * logits) / rate if rate else logits


def recapped(z: Tensor, rate: float) -> Tensor:
    """The logits that these are of."""
    return torch.atanh(rate * z) / rate if rate else z


def over_uncapped(gradient: Tensor, logits: Tensor, rate: float) -> Tensor:
    """The gradient over those, of one over the logits."""
    return gradient * torch.cosh(rate * logits).square() if rate else gradient


def student_rate(student: Tensor, gradient: Tensor) -> float | None:
    """r of rows [R, V] that count; 0: they are not capped, None: neither do their gradients add up to 0 at any r."""

    def left(rate: float) -> Tensor:
        over = over_uncapped(gradient, student, rate)
        total: Tensor = over.sum(-1) / over.abs().sum(-1)
        return total

    return _rate(left)


def teacher_rate(seen: Callable[[Tensor], Tensor], teacher: Tensor) -> float | None:
    """r of logits [..., V], all of them positive, of which `seen` is what the loss makes; likewise."""
    before = seen(teacher)
    size = (seen(teacher.flip(-1)) - before).norm()  # what another teacher does

    def left(rate: float) -> Tensor:
        z = uncapped(teacher, rate)
        change = seen(recapped(z - z.amin(-1, keepdim=True), rate)) - before
        return change / float(size)

    return _rate(left)


def _rate(left: Callable[[float], Tensor]) -> float | None:
    def holds(rate: float) -> bool:
        return float(left(rate).abs().max()) < _HOLDS

    if holds(0.0):
        return 0.0

    for start in sorted(_RATES, key=lambda rate: float(left(rate).norm()))[:3]:
        rate = math.exp(minimised(lambda numbers: left(math.exp(numbers[0])), [math.log(start)], limit=9)[0])
        if holds(rate):
            return rate
    return None
