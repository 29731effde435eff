"""The verbs of `fused_kd.teachers` for logits that are scaled and capped before anything else is done with them:

    z = softcap tanh(scale logit / softcap)      dz/dlogit = scale (1 - (z / softcap)^2)

or z = scale logit, without a softcap; as Gemma 2 has it (Gemma Team, 2024, "Gemma 2: Improving Open Language Models at
a Practical Size", section 2). They are written for a few rows at a time, in the loss's dtype, and are the logits of the
verbs; the gradient over them becomes the logits' own. Where `RowOptions.caps` is empty nothing of this happens.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_kd import teachers
from fused_kd.backends.rows import RowOptions, row_dtype
from fused_kd.ensemble import piece_rows, pieces
from fused_kd.teachers import Teacher

_NONE = float("inf")


class Cap(NamedTuple):
    scale: float
    softcap: float  # infinite where there is none

    def of(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        z = logits.to(dtype)
        return z * self.scale if self.softcap == _NONE else (z * (self.scale / self.softcap)).tanh_().mul_(self.softcap)

    def slope(self, z: Tensor) -> Tensor | float:
        u = z / self.softcap
        return self.scale if self.softcap == _NONE else (1 - u) * (1 + u) * self.scale


def rows_forward(
    student: Tensor, teacher: Sequence[Tensor], targets: Tensor, kind: str, options: RowOptions
) -> tuple[Tensor, Tensor, Tensor]:
    if not options.caps:
        return teachers.rows_forward(student, teacher, targets, kind, options)
    teachers.check_rows(student, Teacher(kind, tuple(teacher)), targets, options)
    soft, hard, stats = teachers.new_results(student, teacher, targets, kind)
    for z, t, of_piece, _, span in visited(student, teacher, kind, options):
        soft[span], hard[span], stats[span] = teachers.rows_forward(z, t, targets[span], kind, of_piece)
    return soft, hard, stats


def rows_backward(
    student: Tensor,
    teacher: Sequence[Tensor],
    targets: Tensor,
    stats: Tensor,
    grad_soft: Tensor,
    grad_hard: Tensor,
    kind: str,
    options: RowOptions,
    out: Tensor,
) -> None:
    if not options.caps:
        return teachers.rows_backward(student, teacher, targets, stats, grad_soft, grad_hard, kind, options, out)
    slope = _caps(options)[0].slope
    for z, t, of_piece, index, span in visited(student, teacher, kind, options):
        gradient = torch.empty_like(z)
        dtype, stats_dtype, _ = teachers.row_dtypes(kind, z, t)
        vectors = stats[span].to(stats_dtype), grad_soft[span].to(dtype), grad_hard[span].to(dtype)
        teachers.rows_backward(z, t, targets[span], *vectors, kind, of_piece, gradient)
        out[index] = gradient.mul_(slope(z))
    return None


def rows_fused(
    student: Tensor,
    teacher: Sequence[Tensor],
    targets: Tensor,
    coef_soft: Tensor,
    coef_hard: Tensor,
    kind: str,
    options: RowOptions,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    if not options.caps:
        return teachers.rows_fused(student, teacher, targets, coef_soft, coef_hard, kind, options, out)
    slope = _caps(options)[0].slope
    soft, hard, _ = teachers.new_results(student, teacher, targets, kind)
    for z, t, of_piece, index, span in visited(student, teacher, kind, options):
        gradient = torch.empty_like(z)
        coefs = coef_soft[span], coef_hard[span]
        soft[span], hard[span] = teachers.rows_fused(z, t, targets[span], *coefs, kind, of_piece, gradient)
        out[index] = gradient.mul_(slope(z))
    return soft, hard


def rows_entropy(student: Tensor, teacher: Sequence[Tensor], targets: Tensor, kind: str, options: RowOptions) -> Tensor:
    if not options.caps:
        return teachers.rows_entropy(student, teacher, targets, kind, options)
    result, *_ = teachers.new_results(student, teacher, targets, kind)
    for z, t, of_piece, _, span in visited(student, teacher, kind, options):
        result[span] = teachers.rows_entropy(z, t, targets[span], kind, of_piece)
    return result


def _caps(options: RowOptions) -> tuple[Cap, Cap]:
    """The student's and the teacher's."""
    return Cap(*options.caps[:2]), Cap(*options.caps[2:])


def visited(
    student: Tensor, teacher: Sequence[Tensor], kind: str, options: RowOptions
) -> Iterator[tuple[Tensor, tuple[Tensor, ...], RowOptions, tuple[int | slice, ...], slice]]:
    """The student's capped logits, the teacher's tensors, options without caps; what indexes them, and which rows."""
    of_student, of_teacher = _caps(options)
    logits = teachers.logits_of(Teacher(kind, tuple(teacher)))
    number, dtype = len(logits), row_dtype(student, *logits)
    for index, span in pieces(student.shape[:-1], piece_rows(student)):
        views = [x[index] for x in teacher]
        first = len(views) - number
        t = (*views[:first], *(of_teacher.of(x, dtype) for x in views[first:]))
        z = of_student.of(student[index], dtype)
        backend = teachers.backend_name(options.backend, z, Teacher(kind, t), options.divergence)
        yield z, t, options._replace(caps=(), backend=backend), index, span
