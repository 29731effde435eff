"""The cross entropy with the labels, in the gradient of somebody's loss; and what fits of a gradient have in common."""

from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = 1e-9  # what is left of a gradient, in units of it, when the answer is right


@dataclass(frozen=True)
class Rows:
    """Rows of which every one counts, with the gradient of the loss's sum: [R, V], labels [R] (None: not used)."""

    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    gradient: Tensor


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


def hard_columns(rows: Rows, temperatures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of a cross entropy is of these, for temperatures [K]: [K, R, V] each."""
    assert rows.labels is not None
    q = torch.softmax(rows.student / temperatures[:, None, None], -1)
    own = torch.nn.functional.one_hot(rows.labels, rows.student.shape[-1]).double().expand_as(q)
    return q, own, torch.ones_like(q)


def solve(columns: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [K, m] of columns [K, R V, m], and what is left of the gradient in units of its norm: [K, R V]."""
    scale = columns.norm(dim=1, keepdim=True).clamp(min=1e-300)
    target = (gradient / gradient.norm()).flatten()[None, :, None].expand(len(columns), -1, 1)
    weights = torch.linalg.lstsq(columns / scale, target).solution
    left = (columns / scale) @ weights - target
    return (weights[..., 0] / scale[:, 0]) * gradient.norm(), left[..., 0]


def read_hard(weights: list[float], temperature: float, vocabulary: int) -> tuple[float, float, str]:
    """Weight and label smoothing of a cross entropy that has these weights of its columns."""
    of_q, of_own, of_one = weights
    smoothing = 1 + of_own / of_q if of_q else 0.0
    smoothing = 0.0 if abs(smoothing) < 1e-7 else nice(smoothing)
    consistent = abs(of_one * vocabulary + smoothing * of_q) < 1e-6 * abs(of_q)
    problem = "" if consistent and 0 <= smoothing <= 1 else "a term that depends on labels, but is no cross entropy"
    return of_q * temperature, smoothing, problem
