"""The verbs of `fused_kd.teachers` for logits that are scaled and capped before anything else is done with them:

    z = softcap tanh(scale logit / softcap)      dz/dlogit = scale (1 - (z / softcap)^2)

or z = scale logit, without a softcap; as Gemma 2 has it (Gemma Team, 2024, "Gemma 2: Improving Open Language Models at
a Practical Size", section 2). They are written for a few rows at a time, in the loss's dtype, and are the logits of the
verbs; the gradient over them becomes the logits' own. Where `RowOptions.caps` is empty nothing of this happens.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_kd import teachers
from fused_kd.backends.rows import RowOptions, row_dtype
from fused_kd.ensemble import piece_rows, pieces
from fused_kd.taught import TaughtRows, Teacher

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


def rows_forward(rows: TaughtRows) -> tuple[Tensor, Tensor, Tensor]:
    if not rows.options.caps:
        return teachers.rows_forward(rows)
    teachers.check_rows(rows)
    soft, hard, stats = teachers.new_results(rows)
    for piece, _, span in pieces_of(rows):
        soft[span], hard[span], stats[span] = teachers.rows_forward(piece)
    return soft, hard, stats


def rows_backward(rows: TaughtRows, stats: Tensor, grad_soft: Tensor, grad_hard: Tensor, out: Tensor) -> None:
    if not rows.options.caps:
        return teachers.rows_backward(rows, stats, grad_soft, grad_hard, out)
    slope = _caps(rows.options)[0].slope
    for piece, index, span in pieces_of(rows):
        gradient = torch.empty_like(piece.student)
        dtype, stats_dtype, _ = teachers.row_dtypes(piece.student, piece.teacher)
        vectors = stats[span].to(stats_dtype), grad_soft[span].to(dtype), grad_hard[span].to(dtype)
        teachers.rows_backward(piece, *vectors, gradient)
        out[index] = gradient.mul_(slope(piece.student))
    return None


def rows_fused(rows: TaughtRows, coef_soft: Tensor, coef_hard: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    if not rows.options.caps:
        return teachers.rows_fused(rows, coef_soft, coef_hard, out)
    slope = _caps(rows.options)[0].slope
    soft, hard, _ = teachers.new_results(rows)
    for piece, index, span in pieces_of(rows):
        gradient = torch.empty_like(piece.student)
        soft[span], hard[span] = teachers.rows_fused(piece, coef_soft[span], coef_hard[span], gradient)
        out[index] = gradient.mul_(slope(piece.student))
    return soft, hard


def rows_entropy(rows: TaughtRows) -> Tensor:
    if not rows.options.caps:
        return teachers.rows_entropy(rows)
    result, *_ = teachers.new_results(rows)
    for piece, _, span in pieces_of(rows):
        result[span] = teachers.rows_entropy(piece)
    return result


def in_pieces(verb: Callable[..., tuple[Tensor, ...]], rows: TaughtRows, *vectors: Tensor) -> tuple[Tensor, ...]:
    """What a verb finds in the rows, [N, ...] each. It takes rows without caps, and vectors with something of each."""
    if not rows.options.caps:
        return verb(rows, *vectors)
    found = [verb(piece, *(x[span] for x in vectors)) for piece, _, span in pieces_of(rows)]
    return tuple(map(torch.cat, zip(*found, strict=True)))


def _caps(options: RowOptions) -> tuple[Cap, Cap]:
    """The student's and the teacher's."""
    return Cap(*options.caps[:2]), Cap(*options.caps[2:])


def pieces_of(rows: TaughtRows) -> Iterator[tuple[TaughtRows, tuple[int | slice, ...], slice]]:
    """A few rows at a time, of capped logits and without caps; what indexes them, and which of all rows they are."""
    of_student, of_teacher = _caps(rows.options)
    (kind, tensors), logits = rows.teacher, teachers.logits_of(rows.teacher)
    first, dtype = len(tensors) - len(logits), row_dtype(rows.student, *logits)
    for index, span in pieces(rows.student.shape[:-1], piece_rows(rows.student)):
        views = [x[index] for x in tensors]
        teacher = Teacher(kind, [*views[:first], *(of_teacher.of(x, dtype) for x in views[first:])])
        z = of_student.of(rows.student[index], dtype)
        backend = teachers.backend_name(rows.options.backend, z, teacher, rows.options.divergence)
        options = rows.options._replace(caps=(), backend=backend)
        yield TaughtRows(z, teacher, rows.targets[span], options), index, span
