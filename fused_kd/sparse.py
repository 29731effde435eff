"""A teacher of which a few log-probabilities a row are known: k classes, and at most one more for all other columns.

For ids i_1 ... i_k with the teacher's p_i at temperature tau_t, and q = softmax(s / tau) of the student, `missing` says
what becomes of the other columns:

    "rest"         one more class: 1 - sum p_i against the student's mass on all others
    "renormalize"  p_i / sum p, and 0 in the others
    "both"         p_i / sum p, and q_i / sum q over the same columns: the others have no part
    "truncate"     the terms of the k columns as they stand: their sum is no divergence, and may be negative

Classes are ordinary PyTorch in float64 on [N, k + 1], by the formulas of `fused_kd.families`; only the student's mass
on the other columns, and the gradient there, need the row verbs: REST of `fused_kd.backends.rows`.
"""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fused_kd.backends import choose
from fused_kd.backends.pytorch import exact_difference, hard_gradient, row_index
from fused_kd.backends.rows import (
    LOG_RATIO,
    NO_LABEL,
    REST,
    SKIP,
    STATS,
    STUDENT_SUM,
    TEACHER_MAX,
    Backend,
    LogitRows,
    RowOptions,
    exact_dtype,
    in_range,
    row_dtype,
)
from fused_kd.checks import check_dense, check_logits
from fused_kd.divergences import (
    AlphaBeta,
    CrossEntropy,
    Divergence,
    ForwardKL,
    LogitMSE,
    ReverseKL,
    with_parameters,
)
from fused_kd.ensemble import pieces
from fused_kd.families import Columns, Linear, column_terms
from fused_kd.options import check_temperature
from fused_kd.real_numbers import number
from fused_kd.taught import TaughtRows

Missing = Literal["rest", "renormalize", "both", "truncate"]
MISSING: tuple[str, ...] = get_args(Missing)

_PIECE = 1 << 20  # elements of logits that from_logits works on at a time
_ROUNDING = 1.1  # what log-probabilities of 16 bits may sum to


@dataclass(frozen=True, eq=False)
class SparseTeacher:
    """A teacher's largest log-probabilities, for teachers behind a server or on disk.

    Args:
        ids: [..., k], int32 or int64: columns of the student's vocabulary, in any order; none twice in a row.
        log_probs: [..., k], any floating dtype: the teacher's log-probabilities of them, at the teacher's temperature,
            normalised over the whole vocabulary. A slot with id -1 or log_prob -inf is empty: k may vary by row.
        missing: what becomes of the other columns. "rest": they are one more class, with what is left of p and of q.
            "renormalize": p is divided by its sum, and 0 there; q stays as it is. "both": p and q are each divided by
            their sum over the ids. "truncate": the terms of the ids as they stand.

    Raises ValueError or TypeError for what does not fit. Not differentiable: a constant.
    """

    ids: Tensor
    log_probs: Tensor
    missing: Missing = "rest"

    def __post_init__(self) -> None:
        if not isinstance(self.ids, Tensor) or self.ids.dtype not in (torch.int32, torch.int64):
            got = self.ids.dtype if isinstance(self.ids, Tensor) else type(self.ids).__name__
            raise TypeError(f"ids must be an int32 or int64 tensor of token ids, got {got}")
        if not isinstance(self.log_probs, Tensor) or not self.log_probs.is_floating_point():
            got = self.log_probs.dtype if isinstance(self.log_probs, Tensor) else type(self.log_probs).__name__
            raise TypeError(f"log_probs must be a floating tensor, got {got}")
        check_dense("ids", self.ids)
        check_dense("log_probs", self.log_probs)
        shapes = f"ids {tuple(self.ids.shape)}, log_probs {tuple(self.log_probs.shape)}"
        if self.ids.shape != self.log_probs.shape:
            raise ValueError(f"ids and log_probs must have the same shape [..., k], got {shapes}")
        if self.ids.dim() == 0 or self.ids.shape[-1] == 0:
            raise ValueError(f"ids and log_probs must have the shape [..., k] with at least one slot, got {shapes}")
        if self.ids.device != self.log_probs.device:
            raise ValueError(f"log_probs must be on the ids' device {self.ids.device}, got {self.log_probs.device}")
        if self.missing not in MISSING:
            raise ValueError(f"missing must be one of {', '.join(map(repr, MISSING))}, got {self.missing!r}")

    @classmethod
    def from_logits(
        cls, teacher_logits: Tensor, k: int, temperature: float = 1.0, missing: Missing = "rest"
    ) -> "SparseTeacher":
        """The k largest log-probabilities of logits [..., V] at this temperature, in float32 (float64 of float64).

        Computed in float64, a few rows at a time. Raises ValueError or TypeError for what does not fit.
        """
        check_logits("teacher_logits", teacher_logits)
        columns = teacher_logits.shape[-1]
        if isinstance(k, bool) or not isinstance(k, numbers.Integral) or not 1 <= k <= columns:
            raise ValueError(f"k must be an int from 1 to the vocabulary's size {columns}, got {k!r}")
        k = int(k)
        check_temperature("temperature", number("temperature", temperature))
        shape = (*teacher_logits.shape[:-1], k)
        ids = teacher_logits.new_empty(shape, dtype=torch.int64)
        log_probs = teacher_logits.new_empty(shape, dtype=row_dtype(teacher_logits))
        with torch.no_grad():
            for index, _ in pieces(shape[:-1], max(1, _PIECE // columns)):
                logits = teacher_logits[index]
                values, ids[index] = logits.topk(k, -1)
                exact = exact_dtype(logits.device)
                log_sum = (logits.to(exact) / temperature).logsumexp(-1, keepdim=True)
                log_probs[index] = (values.to(exact) / temperature - log_sum).to(log_probs.dtype)
        return cls(ids, log_probs, missing)


def check_fits(teacher: SparseTeacher, student: Tensor, divergence: Divergence) -> None:
    """Whether it can teach this student by this divergence. Raises ValueError."""
    if teacher.ids.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            "teacher_logits must have the student's leading shape, got a SparseTeacher with ids "
            f"{tuple(teacher.ids.shape)} for student_logits {tuple(student.shape)}"
        )
    if teacher.ids.device != student.device:
        raise ValueError(
            f"teacher_logits must be on the student's device {student.device}, got a SparseTeacher on "
            f"{teacher.ids.device}"
        )
    _check_divergence(teacher.missing, divergence)


def _check_divergence(missing: str, divergence: Divergence) -> None:
    if isinstance(divergence, LogitMSE):
        raise ValueError(
            "divergence 'logit_mse' compares logits, and a SparseTeacher has none: take another divergence"
        )
    if missing == "truncate" and not isinstance(divergence, ForwardKL | ReverseKL | CrossEntropy):
        raise ValueError(
            "a SparseTeacher with missing='truncate' has the divergences 'forward_kl', 'reverse_kl' and "
            f"'cross_entropy' alone, got {divergence.name!r}; take one of them, or missing='rest'"
        )
    if missing == "renormalize" and isinstance(divergence, AlphaBeta) and divergence.alpha + divergence.beta != 1:
        raise ValueError(
            "a SparseTeacher with missing='renormalize' needs of the other columns the sum of q^(alpha + beta), which "
            f"is not the student's mass on them, got {divergence!r}; take alpha + beta = 1, or missing='rest'"
        )


# The verbs. `teacher` is (ids [..., k], log_probs [..., k]), `kind` what `missing` says, and the stats are those of the
# row verbs with the gradient of the k + 1 classes after them, [N, k + 1], times tau.


def check_teacher(student: Tensor, teacher: Sequence[Tensor]) -> None:
    """Of an operator. Raises ValueError or TypeError."""
    if len(teacher) != 2:
        raise ValueError(f"teacher must be ids [..., k] and log_probs [..., k], got {len(teacher)} tensors")
    SparseTeacher(teacher[0], teacher[1])


def backend_for(name: str, student: Tensor, teacher: Sequence[Tensor], divergence: str) -> Backend:
    return choose(name, student, student, REST)


def check_rows(rows: TaughtRows) -> None:
    """On the CPU. Raises IndexError or ValueError for a row that counts and cannot be."""
    if rows.targets.device.type == "cpu":
        columns = rows.student.shape[-1]
        _checked(_slots(rows.teacher.tensors, columns), rows.targets, rows.teacher.kind, columns)


def row_dtypes(student: Tensor, teacher: Sequence[Tensor]) -> tuple[torch.dtype, torch.dtype, int]:
    """The dtype of vectors with one number a row; that of stats, and how many numbers these have a row."""
    dtype = row_dtype(student)
    return dtype, dtype, STATS + teacher[0].shape[-1] + 1


def rows_forward(rows: TaughtRows) -> tuple[Tensor, Tensor, Tensor]:
    columns = rows.student.shape[-1]
    slots = _slots(rows.teacher.tensors, columns)
    log_p = _teachers_classes(slots, rows.targets, rows.teacher.kind, columns)
    soft, hard, stats, at_ids = _visited(rows, slots)
    slope = stats.new_zeros((len(stats), slots.ids.shape[-1] + 1))
    if rows.options.soft:
        rest = log_rest(stats[:, TEACHER_MAX], stats[:, STUDENT_SUM], stats[:, LOG_RATIO], rows.options)
        value, gradient = concluded(log_p, at_ids, rest, rows, columns)
        soft, slope = value.to(soft.dtype), gradient.to(stats.dtype)
    return soft, hard, torch.cat([stats, slope], -1)


def rows_visited(rows: TaughtRows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All that `concluded` needs of the student: what the verb has of REST, and the logits at the ids [N, k], -inf
    where there is none. The columns may be some of a longer row, from the first of which ids and labels are counted."""
    return _visited(rows, _slots(rows.teacher.tensors, rows.student.shape[-1]))


def teachers_classes(rows: TaughtRows, columns: int | Tensor) -> Tensor:
    """log p of the classes, [N, k + 1], float64, for so many columns; NaN in rows that cannot be. On the CPU these
    raise."""
    return _teachers_classes(_slots(rows.teacher.tensors, columns), rows.targets, rows.teacher.kind, columns)


def concluded(
    log_p: Tensor, at_ids: Tensor, rest: Tensor, rows: TaughtRows, columns: int | Tensor
) -> tuple[Tensor, Tensor]:
    """The soft term [N] of rows of so many columns, and its gradient [N, k + 1], times tau, in the logarithms of the
    student's masses, in float64: from the teacher's classes, the student's logits at the ids, and log R of REST."""
    divergence = with_parameters(rows.options.divergence, rows.options.parameters)
    _check_divergence(rows.teacher.kind, divergence)
    x = at_ids.to(log_p.dtype) / rows.options.temperature
    value, gradient = _of_classes(x, rest, log_p, rows.teacher.kind, divergence)
    value = torch.where(in_range(rows.targets, columns), value, torch.nan)
    return torch.where(rows.targets == SKIP, 0.0, value), gradient


def log_rest(point: Tensor, total: Tensor, rounding: Tensor, options: RowOptions) -> Tensor:
    """log R of REST, in float64, from the stats that have it."""
    exact = exact_dtype(total.device)
    return point.to(exact) / options.temperature + (total.to(exact) + rounding.to(exact)).log()


def rows_backward(rows: TaughtRows, stats: Tensor, grad_soft: Tensor, grad_hard: Tensor, out: Tensor) -> None:
    student, (_, tensors), targets, options = rows
    columns = student.shape[-1]
    slots = _slots(tensors, columns)
    stats, slope = stats[:, :STATS], stats[:, STATS:]
    values = (grad_soft / options.temperature).unsqueeze(1) * slope[:, :-1]
    if options.hard:
        logits, is_label = _logits_at(student, slots).to(stats.dtype), slots.ids == targets.unsqueeze(1)
        rise = hard_gradient(logits, is_label, stats.unsqueeze(1), options.label_smoothing, columns)
        rise = rise * grad_hard.unsqueeze(1)
        values = values + torch.where((targets == NO_LABEL).unsqueeze(1), 0.0, rise)
    valid = in_range(targets, columns)
    instead = torch.where(valid, 0.0, torch.nan).unsqueeze(1)
    values = torch.where((valid & (targets != SKIP)).unsqueeze(1), values, instead).to(out.dtype)

    # (The student's logits have been read: they may be overwritten now.)
    backend, of_rest = _rest_rows(rows, slots)
    backend.rows_backward(of_rest, stats.contiguous(), grad_soft * slope[:, -1], grad_hard, out)
    # An empty slot writes what the first filled one does; or where none is, what is there.
    any_filled, first = slots.filled.max(-1, keepdim=True)
    first_id = slots.ids.gather(1, first).clamp(min=0)
    there = out.gather(-1, first_id.reshape(*student.shape[:-1], 1)).reshape(first_id.shape)
    instead = torch.where(any_filled, values.gather(1, first), there)
    ids, values = torch.where(slots.filled, slots.ids, first_id), torch.where(slots.filled, values, instead)
    # (Not scatter_, which goes over all of a 16-bit tensor on the CPU.)
    rows_of_out = row_index(torch.arange(len(ids), device=ids.device), student.shape[:-1])
    index = *(x if x is None else x.unsqueeze(1) for x in rows_of_out), ids
    out[index] = values


def rows_entropy(rows: TaughtRows) -> Tensor:
    return classes_entropy(rows, rows.student.shape[-1])


def classes_entropy(rows: TaughtRows, columns: int | Tensor) -> Tensor:
    """`rows_entropy`, of rows of so many columns."""
    value = entropy(teachers_classes(rows, columns))
    return torch.where(rows.targets == SKIP, 0.0, value).to(row_dtype(rows.student))


class _Slots(NamedTuple):
    """Of N rows with k slots, [N, k]."""

    given: Tensor  # the ids as they are
    log_probs: Tensor  # likewise
    ids: Tensor  # int64, -1 where empty or out of range
    filled: Tensor


def _slots(teacher: Sequence[Tensor], columns: int | Tensor) -> _Slots:
    given, log_probs = (x.reshape(-1, x.shape[-1]) for x in teacher)
    filled = (given >= 0) & (given < columns) & (log_probs != -torch.inf)
    return _Slots(given, log_probs, torch.where(filled, given, -1).to(torch.int64), filled)


def _checked(slots: _Slots, targets: Tensor, kind: str, columns: int | Tensor) -> tuple[Tensor, Tensor]:
    """log p in float64, -inf where empty, and log sum p [N, 1]; NaN in rows that cannot be. On the CPU these raise, if
    they count."""
    log_p = slots.log_probs.to(exact_dtype(targets.device))
    out_of_range = (slots.ids != slots.given) & (log_p != -torch.inf)
    log_p = torch.where(slots.filled, log_p, -torch.inf)
    log_sum = log_p.logsumexp(-1, keepdim=True)
    ordered = slots.ids.sort(-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    bad = (out_of_range.any(-1) | twice.any(-1)) & (targets != SKIP)
    if kind in ("rest", "truncate"):
        bad |= (log_sum.squeeze(1) > math.log(_ROUNDING)) & (targets != SKIP)
    if targets.device.type == "cpu":
        if not bad.any():
            return log_p, log_sum
        row = int(bad.nonzero()[0])
        if out_of_range[row].any():
            slot = int(out_of_range[row].nonzero()[0])
            raise IndexError(
                f"ids: row {row} has an id in slot {slot} that is not in [0, {columns}), the student's vocabulary; an "
                "empty slot has the id -1"
            )
        if twice[row].any():
            raise IndexError(f"ids: row {row} has the id {int(ordered[row, 1:][twice[row]][0])} twice")
        raise ValueError(
            f"log_probs: the probabilities of row {row} sum to {float(log_sum[row].exp()):.3g}, more than 1; pass "
            "log-probabilities over the whole vocabulary (of logits: SparseTeacher.from_logits), or have them divided "
            "by their sum with missing='both' or 'renormalize'"
        )
    return torch.where(bad.unsqueeze(1), torch.nan, log_p), torch.where(bad.unsqueeze(1), torch.nan, log_sum)


def _rest_rows(rows: TaughtRows, slots: _Slots) -> tuple[Backend, LogitRows]:
    student, options = rows.student, rows.options._replace(divergence=REST, parameters=())
    ids = slots.ids.reshape(*student.shape[:-1], slots.ids.shape[-1])
    return choose(options.backend, student, student, REST), LogitRows(student, ids, rows.targets, options)


def _logits_at(student: Tensor, slots: _Slots) -> Tensor:
    """[N, k]; anything in an empty slot."""
    ids = slots.ids.clamp(min=0).reshape(*student.shape[:-1], slots.ids.shape[-1])
    return student.gather(-1, ids).reshape(slots.ids.shape)


def _visited(rows: TaughtRows, slots: _Slots) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backend, of_rest = _rest_rows(rows, slots)
    at_ids = torch.where(slots.filled, _logits_at(rows.student, slots), -torch.inf)
    return *backend.rows_forward(of_rest), at_ids


def _teachers_classes(slots: _Slots, targets: Tensor, kind: str, columns: int | Tensor) -> Tensor:
    log_p, log_sum = _checked(slots, targets, kind, columns)
    log_left = torch.full_like(log_sum, -torch.inf)
    scale = torch.zeros_like(log_sum) if kind == "truncate" else log_sum
    if kind == "rest":
        # With no other column, and where rounding makes their sum more than 1, p is divided by that.
        whole = (slots.filled.sum(-1, keepdim=True) == columns) | (log_sum > 0)
        log_left = torch.where(whole, log_left, (-log_sum.exp()).log1p())
        scale = torch.where(whole, log_sum, 0.0)
    return torch.cat([log_p - scale, log_left], -1)


def _of_classes(x: Tensor, rest: Tensor, log_p: Tensor, kind: str, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """The divergence [N], and its gradient [N, k + 1] in the logarithms of the student's masses: x [N, k] of the ids,
    -inf where empty, and `rest` [N] of all other columns."""
    if kind == "both":
        rest = torch.where(rest.isnan(), rest, -torch.inf)  # (a row with a NaN is NaN, wherever it is)
    x = torch.cat([x, rest.unsqueeze(1)], -1)
    x = x - x.amax(-1, keepdim=True)
    p, e = log_p.exp(), x.exp()
    total = e.sum(-1, keepdim=True)
    q, log_q = e / total, x - total.log()
    d = log_q - log_p
    if kind == "truncate":
        value, gradient = _truncated(p, q, log_q, d, divergence)
    else:
        value, gradient = _whole(Columns(p, q, log_p, log_q, d, exact_difference(p, q, d)), divergence)
    return value, torch.where(value.isnan().unsqueeze(1), torch.nan, gradient)


def _whole(at: Columns, divergence: Divergence) -> tuple[Tensor, Tensor]:
    family = divergence.family or Linear(0.0 if isinstance(divergence, ReverseKL) else 1.0)
    v, c = column_terms(family, at)
    value, growth = v.sum(-1).clamp(min=0), c.sum(-1, keepdim=True)
    if isinstance(divergence, CrossEntropy):
        value = value + entropy(at.log_p)
    return value, c - at.q * torch.where(growth.isfinite(), growth, torch.nan)


def _truncated(p: Tensor, q: Tensor, log_q: Tensor, d: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """The last class, all other columns, has no term."""
    if isinstance(divergence, ReverseKL):
        terms = torch.where(q == 0, 0.0, q * d)[:, :-1]
        slope = torch.nn.functional.pad(terms + q[:, :-1], (0, 1))
        return terms.sum(-1), slope - q * slope.sum(-1, keepdim=True)
    terms = p * (log_q if isinstance(divergence, CrossEntropy) else d)
    return -torch.where(p == 0, 0.0, terms).sum(-1), q * p.sum(-1, keepdim=True) - p


def entropy(log_p: Tensor) -> Tensor:
    """-sum p log p over the last dimension."""
    p = log_p.exp()
    return -torch.where(p == 0, 0.0, p * log_p).sum(-1)
