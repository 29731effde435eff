"""The entropies of student and teacher, to log beside the loss.

That of logits is the cross entropy of a row with itself: one more visit of it by the row verbs.
"""

import torch
from torch import Tensor

from fused_kd import ops
from fused_kd.backends.rows import RowOptions, with_itself
from fused_kd.taught import LOGITS, TaughtRows
from fused_kd.teachers import common_columns


def row_entropies(rows: TaughtRows, symbolic: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """-sum q log q and -sum p log p, [N] each, at their temperatures, over the columns that the loss has; 0 in a row
    that is skipped. `symbolic` is explained in `ops.py`."""
    student, (kind, tensors), targets, options = rows
    columns = common_columns(student, rows.teacher)
    itself = with_itself(options, options.temperature)._replace(caps=options.caps[:2] * 2)
    of_student = _of_logits(student[..., :columns], targets, itself, symbolic, 0)
    if kind == LOGITS:
        itself = with_itself(options, options.teacher_temperature)._replace(caps=options.caps[2:] * 2)
        return of_student, _of_logits(tensors[0][..., :columns], targets, itself, symbolic, 1)
    of_teacher: Tensor = ops.teachers_entropy(student, list(tensors), targets, kind, *options, symbolic)
    return of_student, of_teacher


def _of_logits(logits: Tensor, targets: Tensor, rows: RowOptions, symbolic: Tensor | None, which: int) -> Tensor:
    """`which`: the student's (0) or the teacher's (1) of the numbers in `symbolic`."""
    if symbolic is not None:
        temperature, caps = symbolic[which : which + 1], symbolic[len(symbolic) - len(rows.caps) :]
        half = len(rows.caps) // 2
        caps = caps[which * half : which * half + half]
        symbolic = torch.cat([temperature, temperature, symbolic[2:3], caps, caps])
    soft: Tensor = ops.rows_forward(logits, logits, targets, *rows, symbolic)[0]
    return soft
