"""The values of the terms that a gradient is fitted with."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fused_kd.identification.fit import Fit
from fused_kd.identification.hard import Rows, nice
from fused_kd.identification.minimum import minimised
from fused_kd.reference import hard_term, soft_term


def parts_of(rows: Rows, fitted: Fit) -> Tensor:
    """Sums over the rows: the divergence, the cross entropy, the teacher's entropy, and 1."""
    soft, hard = torch.zeros(2, dtype=torch.float64)
    temperature, teacher_temperature = fitted.temperature, fitted.teacher_temperature
    if fitted.divergence is not None:
        soft = soft_term(
            rows.student,
            rows.teacher,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            divergence=fitted.divergence,
        ).sum()
    if rows.labels is not None:
        logits = rows.student / fitted.hard_temperature
        hard = hard_term(logits, rows.labels, label_smoothing=fitted.label_smoothing).sum()
    log_p = torch.log_softmax(rows.teacher / teacher_temperature, -1)
    return torch.stack([soft, hard, -(log_p.exp() * log_p).sum(), torch.ones((), dtype=torch.float64)])


def with_teacher_temperature(fitted: Fit, rows: list[Rows], values: Tensor) -> Fit:
    """From the values: the total variation's gradient depends on it by which p are greater than q, and no further."""

    def left(numbers: Sequence[float]) -> Tensor:
        changed = replace(fitted, teacher_temperature=math.exp(numbers[0]))
        parts = torch.stack([parts_of(x, changed) for x in rows])
        result: Tensor = (values - parts[:, 0] * fitted.soft - parts[:, 1] * fitted.hard) / values.norm()
        return result

    starts = [math.log(fitted.teacher_temperature), math.log(fitted.temperature), 0.0]
    best = min((minimised(left, [start]) for start in starts), key=lambda numbers: float(left(numbers).norm()))
    return replace(fitted, teacher_temperature=nice(math.exp(best[0])))
