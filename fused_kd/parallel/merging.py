"""The terms of whole rows, from what each rank has found in its slice of them; `fused_kd.parallel` has the equations.

All ranks compute the same here from the same numbers, in float64. Beside a term each needs the stats from which the
backward verbs make the gradient of its slice: those of the whole row, measured from the slice's own points.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_kd.backends import pytorch
from fused_kd.backends.rows import (
    GROWTH,
    HARD_SUM,
    LOG_RATIO,
    MISS,
    SKIP,
    STUDENT_MAX,
    STUDENT_SUM,
    TEACHER_MAX,
    TEACHER_SUM,
    TOP,
    LogitRows,
    RowOptions,
)
from fused_kd.divergences import ForwardKL, LogitMSE, ReverseKL
from fused_kd.parallel.ranks import Ranks
from fused_kd.sparse import log_rest

# A slice with less than this of p or q is taken to have it: kernels divide sums by each other, in float32.
_LEAST = 2.0**-60


class Found(NamedTuple):
    """What the ranks have found in their slices of N rows, by the names it was sent under: [ranks, N], float64."""

    slices: dict[int | str, Tensor]
    owner: Tensor  # [N]: the rank that has the label, or what else the target is
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
        smoothing = self.options.label_smoothing
        stats[:, MISS] = torch.where(self.owner == r, miss - smoothing, -plain)
        nll = value + torch.where(labelled & (own_sum != 0), own_loss, 0.0)
        if smoothing == 0:
            return nll
        share = (self.ranks.widths.to(stats.dtype) / self.ranks.columns).unsqueeze(1)
        stats[:, MISS] += smoothing * share[r]  # the slice's, with which a verb's gradient at a label begins
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

    def rest(self, stats: Tensor) -> Tensor:
        """log R of REST, likewise."""
        x, r = self.slices, self.ranks.rank
        logs = log_rest(x[TEACHER_MAX], x[STUDENT_SUM], x[LOG_RATIO], self.options)
        whole, own = logs.logsumexp(0), x[STUDENT_SUM][r] + x[LOG_RATIO][r]
        stats[:, TEACHER_MAX] = x[TEACHER_MAX][r]
        share = (logs[r] - whole).exp().clamp(min=_LEAST)
        stats[:, STUDENT_SUM] = own / share
        return whole

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
