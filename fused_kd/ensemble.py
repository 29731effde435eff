"""Several teachers: the mean of their distributions, a few rows at a time.

With p_k = softmax(t_k / tau) and weights w_k >= 0 that sum to 1, as Hinton, Vinyals and Dean (2015) have it:

    arithmetic  p = sum w_k p_k
    geometric   p ~ prod p_k^w_k = softmax(sum w_k t_k / tau)

Both have logits, softmax(logits / tau) = p. They are written for a piece of the rows, a view of bounded size, and are
that piece's teacher for the row verbs of `fused_kd.backends`; the backward writes them again. A teacher of weight 0 has
no part in them, whatever it holds.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import get_args

import torch
from torch import Tensor

from fused_kd.backends import choose
from fused_kd.backends.rows import (
    STATS,
    Backend,
    LogitRows,
    check_targets,
    exact_dtype,
    new_results,
    row_dtype,
    with_itself,
)
from fused_kd.checks import check_columns, check_dense
from fused_kd.divergences import LogitMSE, with_parameters
from fused_kd.options import Ensemble
from fused_kd.taught import TaughtRows

ENSEMBLES: tuple[str, ...] = get_args(Ensemble)

_PIECE = 1 << 18  # elements of logits that are written anew at a time
_PIECE_ON_A_GPU = 1 << 24  # few rows would not fill one


def combined_dtype(student: Tensor, teachers: Sequence[Tensor]) -> torch.dtype:
    """That of the combined logits. Rounded to float32 they would cost a float32 student's gradient its digits."""
    whole = row_dtype(student, *teachers) == torch.float64 or student.dtype == torch.float32
    return exact_dtype(student.device) if whole else torch.float32


def combined(
    teachers: Sequence[Tensor], weights: Tensor, kind: str, temperature: float, dtype: torch.dtype, level: bool
) -> Tensor:
    """Logits [..., V] of the mean of these [..., V], for weights [..., K], computed in float64 and rounded to `dtype`.

    Of an arithmetic mean they are log p times the temperature; not at a `level`, but for a number that is added to a
    row, with which they are about as large as the teachers' and rounded as little. Where the columns are some of a
    longer row, the weights have its `log_sums` after them, [..., 2 K].
    """
    exact = exact_dtype(weights.device)
    weights, *of_whole = torch.split(weights, len(teachers), -1)
    shares = weights.to(exact).unsqueeze(-1).unbind(-2)
    zero = torch.zeros((), dtype=exact, device=weights.device)
    if kind == "geometric":
        terms = (torch.where(w == 0, zero, t.to(exact) * w) for t, w in zip(teachers, shares, strict=True))
        return sum(terms, zero).to(dtype)
    scaled = [t.to(exact) / temperature for t in teachers]
    log_sums = [x.unsqueeze(-1) for each in of_whole for x in each.unbind(-1)] or [_log_sum(x) for x in scaled]
    base = zero
    if not level:
        base = sum((torch.where(w == 0, zero, w * x) for w, x in zip(shares, log_sums, strict=True)), zero)
    first, *more = (
        torch.where(w == 0, -torch.inf, x + (w.log() - log_sum + base))
        for x, w, log_sum in zip(scaled, shares, log_sums, strict=True)
    )
    mean = functools.reduce(torch.logaddexp, more, first)
    return (mean * temperature).to(dtype)


def log_sums(teachers: Sequence[Tensor], temperature: float) -> Tensor:
    """log sum exp(t / temperature) of each, [..., K], in float64."""
    exact = exact_dtype(teachers[0].device)
    return torch.cat([_log_sum(t.to(exact) / temperature) for t in teachers], -1)


def _log_sum(x: Tensor) -> Tensor:
    return x.logsumexp(-1, keepdim=True)


def pieces(sizes: Sequence[int], rows: int) -> Iterator[tuple[tuple[int | slice, ...], slice]]:
    """The rows of a tensor [*sizes, ...] in their order, in views of at most so many, or of one: what indexes each, and
    which of all rows it has. Where there are none, one view of none."""
    axis, inner = len(sizes), 1
    if math.prod(sizes) == 0:
        axis = inner = 0
    while axis > 0 and inner * sizes[axis - 1] <= rows:
        axis -= 1
        inner *= sizes[axis]
    if axis == 0:
        yield (), slice(0, inner)
        return
    step, begin = max(1, rows // inner), 0
    for outer in itertools.product(*map(range, sizes[: axis - 1])):
        for first in range(0, sizes[axis - 1], step):
            number = min(step, sizes[axis - 1] - first)
            yield (*outer, slice(first, first + number)), slice(begin, begin + number * inner)
            begin += number * inner


def piece_rows(like: Tensor) -> int:
    """How many rows of logits [..., V] are written anew at a time."""
    return max(1, (_PIECE if like.device.type == "cpu" else _PIECE_ON_A_GPU) // like.shape[-1])


# The verbs. `teacher` is (weights [..., K], t_1 [..., V_1], ... t_K); with columns that are some of a longer row's, the
# weights are [..., 2 K] as in `combined`.


def backend_for(name: str, student: Tensor, teacher: Sequence[Tensor], divergence: str) -> Backend:
    """As `fused_kd.backends.choose`, for the combined logits."""
    dtype = combined_dtype(student, teacher[1:])
    try:
        return choose(name, student, student.new_empty((1, 1), dtype=dtype), divergence)
    except ValueError as error:
        if student.dtype != torch.float32 or dtype != torch.float64 or "cannot be used" not in str(error):
            raise
        raise ValueError(
            f"{error}. Several teachers of a float32 student are combined in float64, which keeps its gradient's "
            'digits: use backend="auto" or "torch", or student_logits in bfloat16 or float16'
        ) from None


def check_teacher(student: Tensor, teacher: Sequence[Tensor]) -> None:
    """Of an operator. Raises ValueError or TypeError."""
    number = len(teacher) - 1
    if number < 1 or teacher[0].shape[-1] not in (number, 2 * number) or not teacher[0].is_floating_point():
        shapes = [(x.dtype, tuple(x.shape)) for x in teacher]
        raise ValueError(f"teacher must be floating weights [..., K] and K tensors of logits, got {shapes}")
    check_dense("teacher", teacher[0])
    for logits in teacher[1:]:
        check_columns("teacher", logits)


def row_dtypes(student: Tensor, teacher: Sequence[Tensor]) -> tuple[torch.dtype, torch.dtype, int]:
    """The dtype of vectors with one number a row; that of stats, and how many numbers these have a row."""
    _, *teachers = teacher
    return row_dtype(student, *teachers), combined_dtype(student, teachers), STATS


def rows_forward(rows: TaughtRows) -> tuple[Tensor, Tensor, Tensor]:
    student, (_, tensors), targets, options = rows
    soft, hard, stats = new_results(student, targets, row_dtypes(student, tensors))
    # All of them: in a piece a row has another number.
    check_targets(LogitRows(student, stand_in(student, tensors[1:]), targets, options))
    for backend, piece, _, span in combined_rows(rows):
        soft[span], hard[span], stats[span] = backend.rows_forward(piece)
    return soft, hard, stats


def rows_backward(rows: TaughtRows, stats: Tensor, grad_soft: Tensor, grad_hard: Tensor, out: Tensor) -> None:
    for backend, piece, index, span in combined_rows(rows):
        of_soft, of_hard = (grad[span].to(stats.dtype) for grad in (grad_soft, grad_hard))
        backend.rows_backward(piece, stats[span], of_soft, of_hard, out[index])


def rows_entropy(rows: TaughtRows) -> Tensor:
    return rows_with_themselves(rows)[0]


def rows_with_themselves(rows: TaughtRows) -> tuple[Tensor, Tensor, Tensor]:
    """The forward verb for the combined logits as student and teacher: `rows_entropy`, and stats."""
    soft, hard, stats = new_results(rows.student, rows.targets, row_dtypes(rows.student, rows.teacher.tensors))
    rows = rows._replace(options=with_itself(rows.options, rows.options.teacher_temperature))
    for backend, piece, _, span in combined_rows(rows):
        soft[span], hard[span], stats[span] = backend.rows_forward(piece._replace(student=piece.teacher))
    return soft, hard, stats


def rows_log_sums(rows: TaughtRows) -> tuple[Tensor]:
    """`log_sums` of the rows' teachers, [N, K]."""
    _, *teachers = rows.teacher.tensors
    found = [
        log_sums([x[index] for x in teachers], rows.options.teacher_temperature).reshape(-1, len(teachers))
        for index, _ in pieces(rows.student.shape[:-1], piece_rows(rows.student))
    ]
    return (torch.cat(found),)


def stand_in(student: Tensor, teachers: Sequence[Tensor]) -> Tensor:
    """One of the teachers, in float64 if one is, cut to the columns that all have."""
    columns = min(x.shape[-1] for x in (student, *teachers))
    return max(teachers, key=lambda x: x.dtype == torch.float64)[..., :columns]


def combined_rows(rows: TaughtRows) -> Iterator[tuple[Backend, LogitRows, tuple[int | slice, ...], slice]]:
    """Pieces of the rows with the combined logits as their teacher: the backend, what indexes each, and which of all
    rows it has."""
    student, (kind, (weights, *teachers)), targets, options = rows
    level = with_parameters(options.divergence, options.parameters) == LogitMSE(centred=False)
    backend = backend_for(options.backend, student, rows.teacher.tensors, options.divergence)
    dtype, columns = combined_dtype(student, teachers), stand_in(student, teachers).shape[-1]
    for index, span in pieces(student.shape[:-1], piece_rows(student[..., :columns])):
        views = [x[..., :columns][index] for x in teachers]
        logits = combined(views, weights[index], kind, options.teacher_temperature, dtype, level)
        yield backend, LogitRows(student[index], logits, targets[span], options), index, span
