"""The verbs of `fused_kd.capped` for rows of which this rank has a slice of the columns."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_kd import capped, ensemble, sparse
from fused_kd.backends import PREFERENCE, pytorch
from fused_kd.backends.rows import (
    GROWTH,
    HARD_SUM,
    LOG_RATIO,
    MISS,
    STATS,
    STUDENT_MAX,
    STUDENT_SUM,
    TEACHER_MAX,
    TEACHER_SUM,
    TOP,
    LogitRows,
    RowOptions,
    check_targets,
    exact_dtype,
    row_dtype,
    with_itself,
)
from fused_kd.divergences import Divergence, ForwardKL, LogitMSE, ReverseKL, with_parameters
from fused_kd.families import Linear
from fused_kd.parallel.merging import Found
from fused_kd.parallel.ranks import Ranks
from fused_kd.taught import LOGITS, TaughtRows, Teacher
from fused_kd.teachers import backend_name, logits_of

# What a rank sends of a row: the term, and what the terms of all are put together from.
_OF_SOFT = (STUDENT_MAX, TEACHER_MAX, STUDENT_SUM, TEACHER_SUM, LOG_RATIO)
_OF_LOGIT_MSE = (GROWTH, TOP)
_OF_REST = (TEACHER_MAX, STUDENT_SUM, LOG_RATIO)
_OF_HARD = (STUDENT_MAX, HARD_SUM, MISS)

# No backend measures a row from a lower point, if it has a logit that counts.
_NOTHING = -1e28


class Slices(NamedTuple):
    """The verbs, for targets that are labels of the whole vocabulary; the ids of a sparse teacher are of that, too."""

    ranks: Ranks

    def check_rows(self, rows: TaughtRows) -> None:
        """Raises, on the CPU, for a label that nobody has, and for a row of a sparse teacher that cannot be."""
        if rows.targets.device.type == "cpu":
            whole = rows.student.new_empty(1).expand(int(self.ranks.columns))
            check_targets(LogitRows(whole, whole, rows.targets, rows.options))
            if rows.teacher.kind in sparse.MISSING:
                sparse.check_rows(rows._replace(student=whole))

    def of(self, rows: TaughtRows) -> "Slice":
        student, (kind, tensors), targets, options = rows
        columns, part = student.shape[-1], tensors
        divergence = one_sided(with_parameters(options.divergence, options.parameters))
        options = options._replace(divergence=divergence.name, parameters=divergence.parameters)
        if columns == 1:  # which native kernels know to be all of p and q
            options = options._replace(backend=pytorch.NAME)
        local, owner = self.ranks.targets(targets, columns)
        if kind in sparse.MISSING:
            part = self.ranks.ids(tensors[0], columns), tensors[1]
        elif kind == "arithmetic":
            (of_slice,) = capped.in_pieces(ensemble.rows_log_sums, rows._replace(targets=local, options=options))
            log_sums = self.ranks.gathered(of_slice).logsumexp(0)
            part = torch.cat([tensors[0], log_sums.view(tensors[0].shape)], -1), *tensors[1:]
        whole, own = rows._replace(options=options), TaughtRows(student, Teacher(kind, part), local, options)
        return Slice(self.ranks, own, whole, owner)

    def rows_forward(self, rows: TaughtRows) -> tuple[Tensor, Tensor, Tensor]:
        return self.of(rows).forward()

    def rows_fused(self, rows: TaughtRows, coef_soft: Tensor, coef_hard: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        own = self.of(rows)
        soft, hard, stats = own.forward()
        capped.rows_backward(own.backward_rows(), stats, coef_soft, coef_hard, out)
        return soft, hard

    def row_entropies(self, rows: TaughtRows, symbolic: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`fused_kd.entropies`, of whole rows."""
        o, (kind, tensors) = rows.options, rows.teacher
        of_student = self._entropy(rows.student, rows, o.temperature, o.caps[:2])
        if kind in sparse.MISSING:
            return of_student, sparse.classes_entropy(rows, self.ranks.columns)
        if kind != LOGITS:
            mean = rows._replace(options=with_itself(o, o.teacher_temperature))
            return of_student, self.of(mean).entropy_of_teachers()
        return of_student, self._entropy(tensors[0], rows, o.teacher_temperature, o.caps[2:])

    def _entropy(self, logits: Tensor, rows: TaughtRows, temperature: float, caps: tuple[float, ...]) -> Tensor:
        itself, teacher = with_itself(rows.options, temperature)._replace(caps=caps * 2), Teacher(LOGITS, (logits,))
        if not caps:  # capped logits have another dtype
            itself = itself._replace(backend=backend_name(itself.backend, logits, teacher, itself.divergence))
        return self.rows_forward(TaughtRows(logits, teacher, rows.targets, itself))[0]


def one_sided(divergence: Divergence) -> Divergence:
    """A symmetric KL that has no weight on one side is the other: backends may not have it as a family."""
    sides: dict[object, Divergence] = {Linear(1.0): ForwardKL(), Linear(0.0): ReverseKL()}
    return sides.get(divergence.family, divergence)


def takes_second_visit(kind: str, divergence: Divergence) -> bool:
    """Of the columns: the classes of a sparse teacher are known after one."""
    return one_sided(divergence).family is not None and kind not in sparse.MISSING


def has_second_visit(backend: str) -> bool:
    """By itself, as `fused_kd.backends` has it."""
    return hasattr(PREFERENCE[backend], "rows_terms")


class Slice(NamedTuple):
    """Of rows: what the verbs take, and beside it what is only to be seen with the other ranks'."""

    ranks: Ranks
    rows: TaughtRows  # labels, and the ids of a sparse teacher, are counted from the first of the slice's columns
    whole: TaughtRows  # as they were given
    owner: Tensor  # the rank that has the label, or what else the target is

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """soft[N] and hard[N] of the whole rows, and the stats that the backward verbs take for this slice."""
        return self._merged(*self._visited())

    def entropy_of_teachers(self) -> Tensor:
        """Of several; with the options of `with_itself`."""
        soft, hard, stats = capped.in_pieces(ensemble.rows_with_themselves, self.rows)
        first = self._first_of_teacher()
        for point, total in (STUDENT_MAX, STUDENT_SUM), (TEACHER_MAX, TEACHER_SUM):
            _say_nothing(stats, point, (total,), first)
        return self._merged(soft, hard, stats, stats[:, :0])[0]

    def _merged(self, soft: Tensor, hard: Tensor, stats: Tensor, at_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        o, divergence = self.rows.options, self._divergence
        own = self._sent(soft, hard, stats)
        numbers = torch.stack([x.to(stats.dtype) for x in own.values()], 1)
        if o.soft:
            numbers = torch.cat([numbers, at_ids.to(stats.dtype)], 1)
        received = self.ranks.gathered(numbers).to(exact_dtype(stats.device))
        found = Found(dict(zip(own, received.unbind(-1), strict=False)), self.owner, self.ranks, o)
        whole = torch.zeros((len(stats), STATS), dtype=received.dtype, device=stats.device)
        slope = whole.new_zeros((len(stats), at_ids.shape[1] + self._sparse))

        dtype = soft.dtype
        if o.soft and self._sparse:
            soft, slope = self._of_classes(received[..., len(own) :].amax(0), found.rest(whole))
        elif o.soft and isinstance(divergence, LogitMSE):
            soft = found.logit_mse(divergence, whole)
        elif o.soft:
            soft = found.soft(self._first_options().divergence, whole)
            if takes_second_visit(self.rows.teacher.kind, divergence):
                sums = self.ranks.gathered(self._term_sums(whole.to(stats.dtype)))
                soft, whole[:, GROWTH], whole[:, TOP] = pytorch.concluded(sums.to(whole.dtype).sum(0).T)
        if o.hard:
            hard = found.hard(self._first_of_student(), whole)
        return soft.to(dtype), hard.to(dtype), torch.cat([whole, slope], 1).to(stats.dtype)

    def backward_rows(self) -> TaughtRows:
        """What the backward verbs take: as much of label smoothing as the slice is of the vocabulary. (On a GPU that
        waits.)"""
        o, columns = self.rows.options, self.rows.student.shape[-1]
        if takes_second_visit(self.rows.teacher.kind, self._divergence):
            o = o._replace(backend=self._second_visitor())
        if o.label_smoothing > 0:
            o = o._replace(label_smoothing=o.label_smoothing * columns / int(self.ranks.columns))
        return self.rows._replace(options=o)

    @property
    def _dtype(self) -> torch.dtype:
        return row_dtype(self.rows.student, *logits_of(self.rows.teacher))

    @property
    def _sparse(self) -> bool:
        return self.rows.teacher.kind in sparse.MISSING

    @property
    def _divergence(self) -> Divergence:
        return with_parameters(self.rows.options.divergence, self.rows.options.parameters)

    def _second_visitor(self) -> str:
        """The backend of the second visit and of the gradient, which must see alike what columns have more than half of
        q."""
        name = self.rows.options.backend
        return name if name != "auto" and has_second_visit(name) else pytorch.NAME

    def _first_options(self) -> RowOptions:
        """Of the first visit."""
        o = self.rows.options
        if takes_second_visit(self.rows.teacher.kind, self._divergence):
            o = o._replace(divergence=ForwardKL.name, parameters=())
        # (Entirely: hard is then the slice's log-sum-exp less its mean.)
        return o._replace(label_smoothing=1.0) if o.label_smoothing > 0 else o

    def _first_of_student(self) -> Tensor:
        """The logits in the first column, [N]."""
        return _logits_at(self.rows.student, torch.zeros_like(self.owner), self.rows.options.caps[:2], self._dtype)

    def _first_of_teacher(self) -> Tensor:
        """Likewise, or those of several combined."""
        (kind, tensors), o, firsts = self.rows.teacher, self.rows.options, torch.zeros_like(self.owner)
        if kind == LOGITS:
            return _logits_at(tensors[0], firsts, o.caps[2:], self._dtype)
        weights, *teachers = tensors
        weights = weights.reshape(len(firsts), weights.shape[-1])
        each = [_logits_at(x, firsts, o.caps[2:], self._dtype).unsqueeze(1) for x in teachers]
        mean = ensemble.combined(each, weights, kind, o.teacher_temperature, weights.dtype, level=False)
        return mean.squeeze(1)

    def _visited(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """soft, hard and stats of the slice; and of a sparse teacher the student's logits at the ids, [N, k]."""
        rows = self.rows._replace(options=self._first_options())
        if self._sparse:
            soft, hard, stats, at_ids = capped.in_pieces(sparse.rows_visited, rows)
            _say_nothing(stats, STUDENT_MAX, (HARD_SUM,), self._first_of_student())
            return soft, hard, stats, at_ids
        soft, hard, stats = capped.rows_forward(rows)
        _say_nothing(stats, STUDENT_MAX, (STUDENT_SUM, HARD_SUM), self._first_of_student())
        if rows.options.soft:
            _say_nothing(stats, TEACHER_MAX, (TEACHER_SUM,), self._first_of_teacher())
        return soft, hard, stats, stats[:, :0]

    def _sent(self, soft: Tensor, hard: Tensor, stats: Tensor) -> dict[int | str, Tensor]:
        """What `Found` needs of this slice, beside the logits at ids."""
        o = self.rows.options
        sent: dict[int | str, Tensor] = {}
        if o.soft and self._sparse:
            sent |= {i: stats[:, i] for i in _OF_REST}
        elif o.soft:
            needed: tuple[int, ...] = _OF_LOGIT_MSE if isinstance(self._divergence, LogitMSE) else _OF_SOFT
            needed = (*needed, TOP) if isinstance(self._divergence, ReverseKL) else needed
            sent |= {"soft": soft} | {i: stats[:, i] for i in needed}
        if o.hard:
            sent |= {"hard": hard} | {i: stats[:, i] for i in _OF_HARD}
            if o.label_smoothing > 0:
                labels = self.rows.targets.clamp(min=0)
                logit = _logits_at(self.rows.student, labels, o.caps[:2], stats.dtype)
                nll = pytorch.label_loss(stats[:, MISS] * stats[:, HARD_SUM], stats[:, STUDENT_MAX] - logit)
                sent |= {"hard": nll, "logit": logit, "above mean": hard}
        return sent

    def _of_classes(self, at_ids: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """The term of a sparse teacher, and its gradient in the logarithms of the classes' masses."""
        log_p = sparse.teachers_classes(self.whole, self.ranks.columns)
        return sparse.concluded(log_p, at_ids, rest, self.whole, self.ranks.columns)

    def _term_sums(self, stats: Tensor) -> Tensor:
        """The second visit, [N, 4]."""

        def terms(rows: TaughtRows, stats: Tensor) -> tuple[Tensor]:
            visit: Callable[..., Tensor] = getattr(PREFERENCE[rows.options.backend], "rows_terms")  # noqa: B009
            if rows.teacher.kind == LOGITS:
                return (visit(rows.of_logits(), stats).to(stats.dtype),)
            found = [visit(piece, stats[span]) for _, piece, _, span in ensemble.combined_rows(rows)]
            return (torch.cat(found).to(stats.dtype),)

        rows = self.rows._replace(options=self.rows.options._replace(backend=self._second_visitor()))
        return capped.in_pieces(terms, rows, stats)[0]


def _logits_at(logits: Tensor, columns: Tensor, caps: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """One of each row, [N]."""
    found = logits.gather(-1, columns.view(*logits.shape[:-1], 1)).flatten()
    return capped.Cap(*caps).of(found, dtype) if caps else found.to(dtype)


def _say_nothing(stats: Tensor, point: int, sums: tuple[int, ...], first_column: Tensor) -> None:
    """Makes sums of 0 of a slice of -inf, as the torch and native backends have them. Triton's are NaN, and its point
    is that of a slice of NaN, too: the first column tells the two apart."""
    nothing = (stats[:, point] <= _NOTHING) & (first_column <= _NOTHING)
    for i in sums:
        stats[:, i] = torch.where(nothing & stats[:, i].isnan(), 0.0, stats[:, i])
