"""What each position is for, and what its terms count for: labels, weights and the reduction as vectors over the rows.

Everything here is ordinary PyTorch on one number a row. Of the student only the leading shape and the device are looked
at: its logits or its hidden states.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fused_kd.backends.rows import NO_LABEL, OUT_OF_RANGE, SKIP
from fused_kd.options import KDOptions, Reduction

# What a term of each row is multiplied by: one number for all rows, or a vector [N].
Coefficient = float | Tensor


def as_vector(value: Coefficient, like: Tensor) -> Tensor:
    """One number for each of the rows of which `like` has one."""
    if isinstance(value, Tensor):
        return value.expand(like.shape).to(like.dtype)  # PyTorch's zeros without memory are float64 once multiplied
    return torch.full_like(like, value)


class Counted(NamedTuple):
    """Rows are the positions in row-major order."""

    targets: Tensor  # [N]: the label, or SKIP or NO_LABEL
    of_soft: Coefficient  # so that a sum over the rows is the reduction of a term
    of_hard: Coefficient
    coef_soft: Coefficient  # the same times the weight that the options give the term
    coef_hard: Coefficient


def counted(
    student: Tensor,
    labels: Tensor | None,
    num_items: float | Tensor | None,
    weights: Tensor | None,
    options: KDOptions,
    dtype: torch.dtype,
    eager: bool,
) -> Counted:
    """For a student [..., any]. `dtype`: of the vectors; `eager`: what `checks.plain` says of the tensors."""
    readable = eager and student.device.type == "cpu"
    soft_on_ignored = options.soft_on_ignored and options.has_soft
    targets = _targets(student, labels, weights, options.ignore_index, NO_LABEL if soft_on_ignored else SKIP)
    if options.shift:
        targets = _shifted(targets, SKIP)
        weights = None if weights is None else _shifted(weights, 0.0)
    targets = targets.flatten()
    if weights is not None:
        weights = weights.flatten().to(dtype)

    taken = float if eager else partial(_in_graph, dtype=dtype, device=student.device)
    if not (num_items is None or isinstance(num_items, Tensor)):
        num_items = taken(num_items)
    rows = targets != SKIP
    rate = partial(_rate, weights, num_items, student.shape[0], options.reduction, dtype, readable)
    of_soft = of_hard = rate(rows)
    if soft_on_ignored:
        of_hard = rate(rows & (targets != NO_LABEL))
    return Counted(
        targets, of_soft, of_hard, options.weight_of_soft(taken) * of_soft, options.weight_of_hard(taken) * of_hard
    )


def known(value: float) -> bool:
    """Not for a number that torch.compile keeps symbolic, since it changes from call to call."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value  # noqa: PLC0415  (takes a second)

    return has_static_value(value)


def _in_graph(value: float, dtype: torch.dtype, device: torch.device | str) -> float | Tensor:
    """A symbolic number as a tensor. An operator would make a constant of it, to be compiled anew for each value; so
    does PyTorch 2.11 of one from which another number is computed."""
    if known(value):
        return value
    # Not full() nor scalar_tensor(), in which inductor takes the first value for all.
    return torch.ones((), dtype=dtype, device=device) * value


def _targets(student: Tensor, labels: Tensor | None, weights: Tensor | None, ignore_index: int, ignored: int) -> Tensor:
    """What each position is for: its label, SKIP or NO_LABEL, in the logits' leading shape."""
    if labels is None:
        targets = student.new_full(student.shape[:-1], NO_LABEL, dtype=torch.int64)
    elif ignore_index == ignored == SKIP:
        targets = labels
    else:
        targets = labels if ignore_index == SKIP else labels.masked_fill(labels == SKIP, OUT_OF_RANGE)
        targets = targets.masked_fill(labels == ignore_index, ignored)
    return targets if weights is None else targets.masked_fill(weights == 0, SKIP)


def _shifted(values: Tensor, last: float) -> Tensor:
    """Position i gets what belongs to position i + 1."""
    if values.shape[-1] == 0:
        return values
    return torch.cat([values[..., 1:], values.new_full((*values.shape[:-1], 1), last)], -1)


def _rate(
    weights: Tensor | None,
    num_items: float | Tensor | None,
    batch: int,
    reduction: Reduction,
    dtype: torch.dtype,
    readable: bool,
    rows: Tensor,
) -> float | Tensor:
    """What each of `rows` counts for, so that they need only be summed. A mean over nothing is 0, not 0 / 0."""
    divisor: float | Tensor = 1.0
    if isinstance(num_items, Tensor):
        divisor = num_items.detach().reshape(()).to(dtype)
        divisor = divisor + (divisor == 0)
    elif num_items is not None:
        divisor = num_items if num_items > 0 else 1.0
    elif reduction == "batchmean":
        divisor = max(1, batch)
    elif reduction == "mean" and weights is not None:
        divisor = (weights * rows).sum()
        divisor = divisor + (divisor == 0)
    elif reduction == "mean" and readable:
        divisor = max(1, int(rows.count_nonzero()))
    elif reduction == "mean":
        divisor = rows.sum(dtype=dtype).clamp(min=1)
    if weights is not None:
        return weights / divisor
    return divisor.reciprocal() if isinstance(divisor, Tensor) else 1 / divisor
