"""The loss of logits whose vocabulary is cut over the ranks of a process group: tensor parallelism.

Each rank has a slice of the columns and visits it by the verbs of any backend, as if it were a vocabulary. With P_r and
Q_r the mass that p and q have in the slice of rank r, and p^r, q^r what they are within it,

    KL(p || q) = KL(P || Q) + sum P_r KL(p^r || q^r)        and so the cross entropy; KL(q || p) with P and Q exchanged
    -log q1[y] = -log Q1_r - log q1^r[y]                    r the rank that has the label y

No term is negative, so nothing cancels; and KL(P || Q) is that of a row with a column for each rank, whose logits are
the slices' log-sum-exps. The torch backend has it in float64, exact where the ranks are close, with every edge case.
The other divergences take a second visit, once Z_s and Z_t of the whole row are known.

One all-gather a visit brings each rank what all have found of a row; from there on all compute the same from the same
numbers. Stats of the whole row, measured from the slice's own points, are then what the backward verb of a slice takes:
nothing is sent backward. A rank sends, in float32,

    forward KL, cross entropy   24 bytes a row          reverse KL   28          logit MSE   12
    the other divergences       24, and 16 of the second visit
    the hard term               16, of which 4 are shared with the soft one but for logit MSE
                                and 8 with label smoothing
    each of the two entropies    24
    the widths of the slices     8 bytes a call
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from fused_kd import capped, linear_op
from fused_kd.autograd import FusedKDFunction, _EagerFunction, _losses
from fused_kd.backends import pytorch
from fused_kd.backends.rows import (
    GROWTH,
    HARD_SUM,
    LOG_RATIO,
    MISS,
    NO_LABEL,
    OUT_OF_RANGE,
    SKIP,
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
    with_itself,
)
from fused_kd.divergences import ForwardKL, LogitMSE, ReverseKL, divergence_of, with_parameters
from fused_kd.options import KDOptions
from fused_kd.positions import Coefficient
from fused_kd.teachers import LOGITS, Teacher, backend_name

# What a rank sends of a row: the term, and what the terms of all are put together from.
_OF_SOFT = (STUDENT_MAX, TEACHER_MAX, STUDENT_SUM, TEACHER_SUM, LOG_RATIO)
_OF_LOGIT_MSE = (GROWTH, TOP)
_OF_HARD = (STUDENT_MAX, HARD_SUM, MISS)

# A slice with less than this of p or q is taken to have it: kernels divide sums by each other, in float32.
_LEAST = 2.0**-60

# No backend measures a row from a lower point, if it has a logit that counts.
_NOTHING = -1e28


class Ranks(NamedTuple):
    """Whose methods are the verbs of `fused_kd.capped`, for slices of rows whose targets are labels of the whole
    vocabulary."""

    group: distributed.ProcessGroup
    rank: int  # in the group
    ends: Tensor  # [ranks]: the columns up to the end of each slice
    label_smoothing: float  # over the whole vocabulary

    @property
    def number(self) -> int:
        return self.ends.shape[0]

    @property
    def widths(self) -> Tensor:
        return self.ends.diff(prepend=self.ends.new_zeros(1))

    def widest(self) -> int:
        """Of the slices. (On a GPU this waits.)"""
        return int(self.widths.max())

    def of_slice(self, options: RowOptions, columns: int) -> RowOptions:
        """Those of the backward verb: as much of label smoothing as the slice is of the vocabulary. (On a GPU that
        waits.)"""
        # Native kernels know that the gradient of a vocabulary of one column is 0.
        if columns == 1 or with_parameters(options.divergence, options.parameters).family is not None:
            options = options._replace(backend=pytorch.NAME)
        if self.label_smoothing > 0:
            options = options._replace(label_smoothing=self.label_smoothing * columns / int(self.ends[-1]))
        return options

    def check_rows(self, student: Tensor, teacher: Teacher, targets: Tensor, options: RowOptions) -> None:
        """Raises IndexError for a label that nobody has, on the CPU."""
        if targets.device.type == "cpu":
            whole = student.new_empty(1).expand(int(self.ends[-1]))
            check_targets(LogitRows(whole, whole, targets, options))

    def located(self, student: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The targets of this rank's slice; and the rank that has the label, or what else the target is.

        A row whose label another rank has is given one here all the same, the first column: the verbs then have the sum
        over the slice. `rows_forward` sees to the gradient there.
        """
        labelled = (targets != SKIP) & (targets != NO_LABEL)
        owner = torch.bucketize(targets, self.ends, right=True)
        owner = torch.where((targets < 0) | (owner == self.number), OUT_OF_RANGE, owner)
        owner = torch.where(labelled, owner, targets)
        first = self.ends[self.rank] - student.shape[-1]
        local = torch.where(owner == self.rank, targets - first, torch.where(owner >= 0, 0, owner))
        return local, owner

    def rows_forward(
        self, student: Tensor, teacher: Sequence[Tensor], targets: Tensor, kind: str, options: RowOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        return rows_forward(self, student, teacher, *self.located(student, targets), kind, options)

    def rows_fused(
        self,
        student: Tensor,
        teacher: Sequence[Tensor],
        targets: Tensor,
        coef_soft: Tensor,
        coef_hard: Tensor,
        kind: str,
        options: RowOptions,
        out: Tensor,
    ) -> tuple[Tensor, Tensor]:
        local, owner = self.located(student, targets)
        soft, hard, stats = rows_forward(self, student, teacher, local, owner, kind, options)
        capped.rows_backward(student, teacher, local, stats, coef_soft, coef_hard, kind, options, out)
        return soft, hard

    def row_entropies(
        self, student: Tensor, teacher: Teacher, targets: Tensor, rows: RowOptions, symbolic: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`fused_kd.entropies`, of whole rows."""
        local, owner = self.located(student, targets)
        found = []
        for logits, temperature, caps in (
            (student, rows.temperature, rows.caps[:2]),
            (teacher.tensors[0], rows.teacher_temperature, rows.caps[2:]),
        ):
            itself = with_itself(rows, temperature)._replace(caps=caps * 2)
            if not caps:  # capped logits have another dtype
                backend = backend_name(rows.backend, logits, Teacher(LOGITS, (logits,)), itself.divergence)
                itself = itself._replace(backend=backend)
            found.append(rows_forward(self, logits, [logits], local, owner, LOGITS, itself)[0])
        return found[0], found[1]


def of_dtensors(
    student: Any, teacher: Any, labels: Any, num_items: Any, weights: Any, options: KDOptions
) -> tuple[tuple[Any, ...], KDOptions]:
    """The local tensors of logits that are sharded on the vocabulary, and options with the group that they are sharded
    over. Raises TypeError or ValueError for any other DTensor."""
    mesh, placements = student.device_mesh, student.placements
    sharded = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if len(sharded) != 1 or not placements[sharded[0]].is_shard(student.dim() - 1):
        raise ValueError(
            "student_logits is a DTensor, which must be sharded on the vocabulary, its last dimension, and on nothing "
            f"else, got the placements {placements}; of logits sharded on other dimensions pass to_local(), whose loss "
            "is that of this rank's positions"
        )
    if getattr(teacher, "placements", None) != placements or teacher.device_mesh != mesh:
        got = getattr(teacher, "placements", type(teacher).__name__)
        raise ValueError(
            f"teacher_logits must be a DTensor with the placements {placements} of student_logits, got {got}"
        )
    others = []
    for name, value in (("labels", labels), ("num_items", num_items), ("weights", weights)):
        whole = not hasattr(value, "full_tensor")
        if not whole and not all(placement.is_replicate() for placement in value.placements):
            raise ValueError(f"{name} must be a whole tensor or a replicated DTensor, got {value.placements}")
        others.append(value if whole else value.to_local())
    group = mesh.get_group(sharded[0])
    if options.process_group not in (None, group):
        raise ValueError("process_group must be None, or the group that the DTensor student_logits is sharded over")
    return (student.to_local(), teacher.to_local(), *others), replace(options, process_group=group)


def ranks_of(student: Tensor, teacher: Teacher, options: KDOptions, eager: bool) -> Ranks:
    """Asks all ranks for the width of their slice. Raises for options that cannot be put together from slices, before
    that."""
    group = options.process_group
    assert group is not None
    if not eager:
        raise TypeError("process_group needs plain tensors in eager mode: no mode, no transform and no other subclass")
    if teacher.kind != LOGITS:
        raise ValueError(
            "process_group takes one teacher's logits, cut as the student's; several teachers and a SparseTeacher are "
            "not supported with it"
        )
    if options.vocab_mismatch != "error":
        raise ValueError(
            'vocab_mismatch="truncate" has no meaning with process_group, where each rank has a slice of both '
            'vocabularies; use "error" and slices of one width'
        )
    if divergence_of(options.divergence).family is not None and options.backend not in ("auto", pytorch.NAME):
        raise ValueError(
            f"backend={options.backend!r} has no part of divergence {options.divergence!r} for a slice of the "
            'vocabulary; with process_group it takes "torch", or "auto"'
        )
    width = torch.full((1,), student.shape[-1], dtype=torch.int64, device=student.device)
    widths = _gathered(width, group)
    return Ranks(group, group.rank(), widths.flatten().cumsum(0), options.label_smoothing)


def rows_loss(
    ranks: Ranks,
    student: Tensor,
    teacher: Teacher,
    targets: Tensor,
    coef_soft: Coefficient,
    coef_hard: Coefficient,
    symbolic: None,
    rows: RowOptions,
    *switches: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fused_kd.autograd.rows_loss` with the labels of the whole vocabulary as targets: the same bits on each rank, and
    the gradient of its slice."""
    ranks.check_rows(student, teacher, targets, rows)
    local, owner = ranks.located(student, targets)
    tail = (teacher.kind, ranks.of_slice(rows, student.shape[-1]), *switches, *teacher.tensors, ranks, owner)
    losses, soft, hard, _ = _MergedFunction.apply(student, local, coef_soft, coef_hard, symbolic, *tail)
    return losses, soft, hard


class _MergedFunction(_EagerFunction):
    """With targets of the slice; and after the teacher's tensors the ranks, and which of them has each row's label."""

    generate_vmap_rule = False
    setup_context = staticmethod(torch.autograd.Function.setup_context)

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *inputs, ranks, owner = inputs  # type: ignore[assignment]
        student, targets, coef_soft, coef_hard, _, kind, options, _, summed, *teacher = inputs
        soft, hard, stats = rows_forward(ranks, student, teacher, targets, owner, kind, options)
        output = (_losses(soft, hard, coef_soft, coef_hard, options, summed), soft, hard, stats)
        FusedKDFunction.setup_context(ctx, tuple(inputs), output)
        ctx.eager = True
        return output


def linear_loss(ranks: Ranks, *arguments: Any) -> tuple[Tensor, ...]:
    """The operator of this name of `linear_op.py`, for heads that are slices: its first three results."""
    results: tuple[Tensor, ...] = _LinearFunction.apply(*arguments, ranks)
    return results


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *arguments, ranks = inputs
        output = _linear_results(ranks, *arguments)
        linear_op.save_operands(ctx, tuple(arguments), output)
        ctx.run = partial(_linear_results, ranks)
        ctx.mark_non_differentiable(*output[1:3])
        return output[:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return linear_op.backward(ctx, *grads)


def _linear_results(ranks: Ranks, *arguments: Any) -> tuple[Tensor, ...]:
    """Each rank has its slice's share in the gradient of the hidden states, which all have."""
    (operands,) = linear_op.checked(linear_op.NAMES, arguments, read=True)
    options = ranks.of_slice(operands.options, operands.student.weight.shape[0])
    results = linear_op.results_of(operands._replace(options=options), ranks)
    of_hidden = results[linear_op.GRADIENTS][0]
    if of_hidden.numel() > 0:
        distributed.all_reduce(of_hidden, group=ranks.group)
    return results


def rows_forward(
    ranks: Ranks,
    student: Tensor,
    teacher: Sequence[Tensor],
    targets: Tensor,
    owner: Tensor,
    kind: str,
    options: RowOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """soft[N] and hard[N] of the whole rows, and the stats that the backward verbs take for this rank's slice."""
    divergence = with_parameters(options.divergence, options.parameters)
    first = options
    if divergence.family is not None:
        first = options._replace(divergence=ForwardKL.name, parameters=())
    smoothed = options.hard and ranks.label_smoothing > 0
    if smoothed:  # entirely: hard is then the slice's log-sum-exp less its mean
        first = first._replace(label_smoothing=1.0)
    soft, hard, stats = capped.rows_forward(student, teacher, targets, kind, first)
    firsts = torch.zeros_like(targets)
    first_column = _logits_at(student, firsts, options.caps[:2], stats.dtype)
    _say_nothing(stats, STUDENT_MAX, (STUDENT_SUM, HARD_SUM), first_column)
    if options.soft:
        of_teacher = _logits_at(teacher[0], firsts, options.caps[2:], stats.dtype)
        _say_nothing(stats, TEACHER_MAX, (TEACHER_SUM,), of_teacher)
    sent: dict[int | str, Tensor] = {}
    if options.soft:
        needed: tuple[int, ...] = _OF_LOGIT_MSE if isinstance(divergence, LogitMSE) else _OF_SOFT
        if isinstance(divergence, ReverseKL):
            needed = (*_OF_SOFT, TOP)
        sent |= {"soft": soft} | {i: stats[:, i] for i in needed}
    if options.hard:
        sent |= {"hard": hard} | {i: stats[:, i] for i in _OF_HARD}
        if smoothed:
            logit = _logits_at(student, targets.clamp(min=0), options.caps[:2], stats.dtype)
            nll = pytorch.label_loss(stats[:, MISS] * stats[:, HARD_SUM], stats[:, STUDENT_MAX] - logit)
            sent |= {"hard": nll, "logit": logit, "above mean": hard}
    received = _gathered(torch.stack(list(sent.values())), ranks.group).to(exact_dtype(student.device))
    slices = dict(zip(sent, received.unbind(1), strict=True))

    found = _Found(slices, owner, ranks, options)
    whole = torch.zeros((len(targets), STATS), dtype=received.dtype, device=student.device)
    if isinstance(divergence, LogitMSE) and options.soft:
        soft = found.logit_mse(divergence, whole)
    elif options.soft:
        soft = found.soft(first.divergence, whole)
        if divergence.family is not None:
            own = _term_sums(student, teacher, targets, kind, options, whole.to(stats.dtype))
            sums = _gathered(own.to(stats.dtype), ranks.group).to(whole.dtype).sum(0)
            soft, whole[:, GROWTH], whole[:, TOP] = pytorch.concluded(sums)
    if options.hard:
        hard = found.hard(first_column, whole)
    dtype = stats.dtype
    return soft.to(dtype), hard.to(dtype), whole.to(dtype)


def _term_sums(
    student: Tensor, teacher: Sequence[Tensor], targets: Tensor, kind: str, options: RowOptions, stats: Tensor
) -> Tensor:
    """The second visit of a slice: what `pytorch.concluded` takes. That of other backends has no verb of its own; and
    which columns have more than half of q, visit and gradient must see alike."""
    if not options.caps:
        return pytorch.rows_terms(LogitRows(student, teacher[0], targets, options), stats)
    sums = [
        pytorch.rows_terms(LogitRows(z, t[0], targets[span], of_piece), stats[span])
        for z, t, of_piece, _, span in capped.visited(student, teacher, kind, options)
    ]
    return torch.cat(sums, 1)


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


class _Found(NamedTuple):
    """What the ranks have found in their slices, by the names of stats: [ranks, N], float64."""

    slices: dict[int | str, Tensor]
    owner: Tensor
    ranks: Ranks
    options: RowOptions

    def soft(self, divergence: str, stats: Tensor) -> Tensor:
        """The term; what this rank needs of the whole row goes into its `stats`."""
        x, o = self.slices, self.options
        z_s, z_t, ratio = x[STUDENT_SUM], x[TEACHER_SUM], x[LOG_RATIO]
        # (A slice of -inf has no point to be measured from.)
        at_s, at_t = torch.where(z_s == 0, 0.0, x[STUDENT_MAX]), torch.where(z_t == 0, 0.0, x[TEACHER_MAX])
        empty = (z_s == 0) | (z_t == 0)
        apart = at_s / o.temperature - at_t / o.teacher_temperature
        log_t = at_t / o.teacher_temperature + z_t.log()
        # Where the sums are close, their difference is in LOG_RATIO, and not in them.
        close = (ratio.abs() < 0.5) & ~empty
        log_s = torch.where(close, log_t + apart + ratio, at_s / o.temperature + z_s.log())
        value, _, of_ranks = self._ranks(log_s, log_t, divergence)
        p, q = (_shares(logs, of_ranks, *at) for logs, *at in (
            (log_t, TEACHER_MAX, TEACHER_SUM), (log_s, STUDENT_MAX, STUDENT_SUM)
        ))  # fmt: skip
        share = q if divergence == ReverseKL.name else p
        value = value + torch.where((share == 0) | empty | self._skipped, 0.0, share * x["soft"]).sum(0)

        r = self.ranks.rank
        stats[:, STUDENT_MAX], stats[:, TEACHER_MAX] = at_s[r], at_t[r]
        stats[:, STUDENT_SUM], stats[:, TEACHER_SUM] = _of_whole(z_s[r], q[r]), _of_whole(z_t[r], p[r])
        whole = of_ranks[:, STUDENT_MAX] - of_ranks[:, TEACHER_MAX] + of_ranks[:, LOG_RATIO]
        stats[:, LOG_RATIO] = torch.where(empty[r], 0.0, whole - apart[r])
        if divergence == ReverseKL.name:
            # -TOP is the mean of delta under q, measured from the slice's points; this one's is left as it is where the
            # slice has all of q.
            mean = x[TOP] - apart
            top = x[TOP][r] + torch.where((q == 0) | empty, 0.0, q * (mean - mean[r])).sum(0)
            top = torch.where(empty[r], 0.0, top)
            stats[:, GROWTH], stats[:, TOP] = value, torch.where(value.isfinite(), top, torch.nan)
        return value

    def hard(self, first_column: Tensor, stats: Tensor) -> Tensor:
        """Likewise."""
        x, r, labelled = self.slices, self.ranks.rank, self.owner >= 0
        z = x[HARD_SUM]
        at = torch.where(z == 0, 0.0, x[STUDENT_MAX])
        logs = at + z.log()
        _, value, of_ranks = self._ranks(logs, None, ForwardKL.name)
        q = _shares(logs, of_ranks, STUDENT_MAX, HARD_SUM)
        owner = torch.where(labelled, self.owner, 0).unsqueeze(0)
        own_loss, own_miss, own_sum = (v.gather(0, owner).squeeze(0) for v in (x["hard"], x[MISS], z))
        beside = of_ranks[:, MISS]  # what the other ranks have of q
        miss = torch.where(own_sum == 0, 1.0, beside + (1 - beside) * own_miss)
        stats[:, STUDENT_MAX] = torch.where(z[r] == 0, stats[:, STUDENT_MAX], at[r])  # 0 without a label, too
        stats[:, HARD_SUM] = _of_whole(z[r], q[r])
        # Where another rank has the label, the gradient at this one's first column is q1 as in all the others.
        plain = (first_column.to(stats.dtype) - at[r]).exp() / stats[:, HARD_SUM]
        smoothing = self.ranks.label_smoothing
        stats[:, MISS] = torch.where(self.owner == r, miss - smoothing, -plain)
        nll = value + torch.where(labelled & (own_sum != 0), own_loss, 0.0)
        if smoothing == 0:
            return nll
        stats[:, MISS] += self.options.label_smoothing  # the slice's, with which a verb's gradient at a label begins
        share = (self.ranks.widths.to(stats.dtype) / self.ranks.ends[-1]).unsqueeze(1)
        mean = (share * torch.where(z == 0, -torch.inf, logs - x["above mean"])).sum(0)
        smoothed = nll + smoothing * (x["logit"].gather(0, owner).squeeze(0) - mean)
        return torch.where(labelled & (nll != torch.inf), smoothed, nll)  # inf - inf would be no loss

    def logit_mse(self, divergence: LogitMSE, stats: Tensor) -> Tensor:
        """Mean and squares of s/tau - t/tau_t over all columns, from those of the slices: Chan, Golub and LeVeque."""
        count = 1 / self.slices[TOP]
        some = count != 0
        squares = torch.where(some, 2 * count * self.slices["soft"], 0.0)
        total = count.sum(0)
        mean = torch.where(some, count * self.slices[GROWTH], 0.0).sum(0) / total
        if divergence.centred:
            squares = squares + torch.where(some, count * (self.slices[GROWTH] - mean).square(), 0.0)
        stats[:, GROWTH], stats[:, TOP] = mean, 1 / total
        return torch.where(self._skipped, 0.0, squares.sum(0) / (2 * total))

    @property
    def _skipped(self) -> Tensor:
        return self.owner == SKIP

    def _ranks(self, log_s: Tensor, log_t: Tensor | None, divergence: str) -> tuple[Tensor, Tensor, Tensor]:
        """The forward verb for rows with a column for each rank; without a teacher's, for the hard term."""
        options = RowOptions(1.0, 1.0, divergence, 0.0, log_t is not None, log_t is None, pytorch.NAME)
        student, teacher = log_s.T.contiguous(), (log_s if log_t is None else log_t).T.contiguous()
        return pytorch.rows_forward(LogitRows(student, teacher, self.owner, options))


def _shares(logs: Tensor, of_ranks: Tensor, at: int, total: int) -> Tensor:
    """What each rank has of p or q, [ranks, N]."""
    return (logs - of_ranks[:, at]).exp() / of_ranks[:, total]


def _of_whole(total: Tensor, share: Tensor) -> Tensor:
    """A slice's sum as that of the row, measured from where the slice's was; any number for a slice of -inf, and NaN in
    a row of -inf, of which no rank has a share."""
    return torch.where((total == 0) & ~share.isnan(), 1.0, total / share.clamp(min=_LEAST))


def _gathered(own: Tensor, group: distributed.ProcessGroup) -> Tensor:
    """[ranks, ...] of what each rank has."""
    every = own.new_empty((group.size(), *own.shape))
    if own.numel() > 0:
        distributed.all_gather(list(every), own.contiguous(), group=group)
    return every
