"""Plain PyTorch, a few rows at a time: any device, any floating dtype, bounded memory.

The same sums as csrc/row_math.h, which stay exact when the student is close to the teacher; docs/design.md derives
them. Rows are finished in float64 where the device has it.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fused_kd.backends.rows import (
    GROWTH,
    HARD_SUM,
    LOG_RATIO,
    MISS,
    NO_LABEL,
    REST,
    SKIP,
    STATS,
    STUDENT_MAX,
    STUDENT_SUM,
    TEACHER_MAX,
    TEACHER_SUM,
    TOP,
    LogitRows,
    check_targets,
    exact_dtype,
    in_range,
    row_dtype,
)
from fused_kd.divergences import CrossEntropy, LogitMSE, ReverseKL, with_parameters
from fused_kd.families import Columns, Family, column_terms

NAME = "torch"
DESCRIPTION = "plain PyTorch, a few rows at a time: any device, any floating dtype"

_CHUNK = 1 << 20  # elements worked on at a time
_SMALL = 0.125  # below this |delta| a polynomial is more exact than a difference of exponentials


def unavailable() -> str | None:
    return None


def refuses(student: Tensor, teacher: Tensor, divergence: str) -> str | None:
    return None


def rows_forward(rows: LogitRows) -> tuple[Tensor, Tensor, Tensor]:
    check_targets(rows)
    dtype = row_dtype(rows.student, rows.teacher)
    shapes = ((rows.number,), (rows.number,), (rows.number, STATS))
    soft, hard, stats = (rows.student.new_zeros(shape, dtype=dtype) for shape in shapes)
    for chunk in _chunks(rows):
        chunk.finish(soft, hard, stats)
    return soft, hard, stats


def rows_backward(rows: LogitRows, stats: Tensor, grad_soft: Tensor, grad_hard: Tensor, out: Tensor) -> None:
    for chunk in _chunks(rows):
        chunk.write_gradient(stats, grad_soft, grad_hard, out)


def rows_fused(rows: LogitRows, coef_soft: Tensor, coef_hard: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    soft, hard, stats = rows_forward(rows)
    rows_backward(rows, stats, coef_soft, coef_hard, out)
    return soft, hard


def rows_terms(rows: LogitRows, stats: Tensor) -> Tensor:
    sums = [chunk.term_sums(stats).T for chunk in _chunks(rows)]
    return torch.cat(sums) if sums else stats.new_zeros((0, 4), dtype=exact_dtype(stats.device))


def concluded(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The value, GROWTH and TOP of rows, from the sums over their columns of v, c, and c and q where q <= 1/2."""
    value, growth, rest_c, rest_q = sums
    # In a column with nearly all of q, c - q G is a small difference of large numbers; the other columns have it.
    return value, torch.where(growth.isfinite(), growth, torch.nan), growth * rest_q - rest_c


def _chunks(rows: LogitRows) -> Iterator["_Chunk"]:
    kind = _RestChunk if rows.options.divergence == REST else _Chunk
    step = max(1, _CHUNK // max(1, rows.columns))
    for begin in range(0, rows.number, step):
        yield kind(rows, torch.arange(begin, min(begin + step, rows.number), device=rows.student.device))


def row_index(rows: Tensor, sizes: Sequence[int]) -> tuple[Tensor | None, ...]:
    """What indexes these rows alone, whatever the strides; a reshape could copy the whole tensor."""
    index = []
    for size in reversed(sizes):  # torch.unravel_index would make a GPU wait for numbers from the CPU
        index.append(rows % size)
        rows = rows // size
    return tuple(reversed(index)) or (None,)


class _Chunk:
    """Some of the rows, those of `span`."""

    def __init__(self, rows: LogitRows, span: Tensor) -> None:
        self.options, self.span, self.columns = o, _, columns = rows.options, span, rows.columns
        self.index = row_index(span, rows.student.shape[:-1])
        self.scale = 1 / o.temperature
        self.s = rows.student[..., :columns][self.index]
        self._take(rows.teacher[row_index(span, rows.teacher.shape[:-1])], row_dtype(rows.student, rows.teacher))
        target = rows.targets[span]
        self.counted = target != SKIP
        self.labelled = self.counted & (target != NO_LABEL)
        self.valid = in_range(target, self.columns)
        self.label = torch.where(self.labelled & self.valid, target, 0).unsqueeze(1)

    def _take(self, teacher: Tensor, dtype: torch.dtype) -> None:
        self.divergence = with_parameters(self.options.divergence, self.options.parameters)
        self.s, self.t = self.s.to(dtype), teacher[:, : self.columns].to(dtype)

    def _pair(self, centre_s: Tensor, centre_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """e_s, e_t and delta, measured from these: e_s = e_t exp(delta)."""
        from_s, from_t = self.s - centre_s, self._teacher_from(centre_t)
        difference = from_s - from_t
        if self._one_temperature:
            apart = _on_grid(centre_s - centre_t)
            difference = _without(apart, self.s, self.t) - _without(apart, centre_s, centre_t)
        if self.columns == 1:
            difference = difference * 0  # both probabilities are 1, whatever the last bit says
        return (from_s * self.scale).exp(), (from_t * self.scale).exp(), difference * self.scale

    def _centres(self) -> tuple[Tensor, Tensor]:
        """The points that rows are measured from, [n, 1], so that delta is small for what most of p lies on (with the
        roles exchanged, most of q, and the student's maximum stays).

        Where one token has it all they are the maxima: delta is exactly 0 there. Else the student's lies the typical
        difference above the teacher's: one logit that sticks out does not move it, unless exponentials from there
        would leave float32's range.
        """
        max_s, max_t = _maximum(self.s), _maximum(self.t)
        base, other = self._teacher_from(max_t), self.s - max_s
        if self._exchanged:
            base, other = other, base
        e = (base * self.scale).exp()
        finite = (other - base).abs() < 1e30
        mass = torch.where(finite, e, 0.0).sum(-1, keepdim=True)
        typical = torch.where(finite, e * (other - base), 0.0).sum(-1, keepdim=True) / mass
        spread = (mass > 2) & (typical.abs() <= 40 / max(1.0, self.scale))
        apart = torch.where(spread, typical, 0.0)
        return (max_s, max_t + apart / self._teacher_factor) if self._exchanged else (max_s + apart, max_t)

    @property
    def _one_temperature(self) -> bool:
        return self.options.temperature == self.options.teacher_temperature

    @property
    def _exchanged(self) -> bool:
        """Reverse KL is forward KL with student and teacher exchanged."""
        return isinstance(self.divergence, ReverseKL)

    @property
    def _teacher_factor(self) -> float:
        """What the teacher's own temperature is: a factor on its logits."""
        return self.options.temperature / self.options.teacher_temperature

    def _teacher_from(self, max_t: Tensor) -> Tensor:
        return (self.t - max_t) * self._teacher_factor

    def finish(self, soft: Tensor, hard: Tensor, stats: Tensor) -> None:
        final = exact_dtype(self.s.device)
        stat = torch.zeros((len(self.span), STATS), dtype=final, device=self.s.device)
        max_s, max_t = self._centres() if self.options.soft else (_maximum(self.s), None)
        stat[:, STUDENT_MAX] = max_s.squeeze(1).to(final)
        if max_t is not None:
            stat[:, TEACHER_MAX] = max_t.squeeze(1).to(final)
            value = self._finish_soft(max_s, max_t, stat)
            soft[self.span] = self._kept(self.counted, value).to(soft.dtype)
        if self.options.hard:
            hard[self.span] = self._kept(self.labelled, self._finish_hard(max_s, stat)).to(hard.dtype)
        stats[self.span] = stat.to(stats.dtype)

    def _finish_soft(self, max_s: Tensor, max_t: Tensor, stat: Tensor) -> Tensor:
        final = stat.dtype
        if isinstance(self.divergence, LogitMSE):
            return self._mean_squared_difference(stat)
        e_s, e_t, delta = self._pair(max_s, max_t)
        if self._exchanged:
            e_s, e_t, delta = e_t, e_s, -delta
        plain = e_s - e_t
        b1 = torch.where(e_t == 0, 0.0, e_t * delta)  # 0 log 0 = 0
        b2 = torch.where(delta.abs() < _SMALL, b1 * _phi_over_delta(delta), plain - b1)
        z_s, z_t, b1_sum, b2_sum = (x.sum(-1, dtype=final) for x in (e_s, e_t, b1, b2))
        x, second, direct = (b1_sum + b2_sum) / z_t, b2_sum / z_t, (z_s / z_t).log()
        # Close to the teacher b1 and b2 are small and carry the value; far from it they are large and cancel.
        close = x.abs() + second < 1
        log_ratio = torch.where(close, x.log1p(), direct)
        whole = (z_s != 0) & (z_t != 0)  # else a row of -inf
        stat[:, STUDENT_SUM], stat[:, TEACHER_SUM] = (z_t, z_s) if self._exchanged else (z_s, z_t)
        stat[:, LOG_RATIO] = -log_ratio if self._exchanged else log_ratio
        if self.divergence.family is not None:
            return self._finish_family(self.divergence.family, e_s, e_t, delta, stat)
        value = torch.where(close, log_ratio - x + second, direct - b1_sum / z_t).clamp(min=0)
        if self._exchanged:
            mean = b1_sum / z_t
            stat[:, TOP] = torch.where(mean.isfinite(), mean, torch.nan)
        if isinstance(self.divergence, CrossEntropy):
            log_e_t = self._teacher_from(max_t) * self.scale
            entropy_sum = torch.where(e_t == 0, 0.0, e_t * log_e_t).sum(-1, dtype=final)
            value = value + z_t.log() - entropy_sum / z_t
        return torch.where(whole, value, torch.nan)

    def _finish_family(self, family: Family, e_s: Tensor, e_t: Tensor, delta: Tensor, stat: Tensor) -> Tensor:
        """The sums of `fused_kd.families` over a row."""
        sums = self._term_sums(family, e_s, e_t, delta, stat.unsqueeze(1).to(e_s.dtype))
        value, stat[:, GROWTH], stat[:, TOP] = concluded(sums)
        return value

    def term_sums(self, stats: Tensor) -> Tensor:
        """For `rows_terms`."""
        stat = stats[self.span].unsqueeze(1).to(self.s.dtype)
        e_s, e_t, delta = self._pair(stat[..., STUDENT_MAX], stat[..., TEACHER_MAX])
        assert self.divergence.family is not None
        return self._kept(self.counted, self._term_sums(self.divergence.family, e_s, e_t, delta, stat))

    def _term_sums(self, family: Family, e_s: Tensor, e_t: Tensor, delta: Tensor, stat: Tensor) -> Tensor:
        columns = self._columns(e_s, e_t, delta, stat)
        v, c = column_terms(family, columns)
        top = columns.q > 0.5
        terms = (v, c, *(torch.where(top, 0.0, x) for x in (c, columns.q)))
        return torch.stack([x.sum(-1, dtype=exact_dtype(x.device)) for x in terms])

    def _finish_hard(self, max_s: Tensor, stat: Tensor) -> Tensor:
        final = stat.dtype
        e_1 = (self.s - max_s).exp()
        others = e_1.scatter(1, self.label, 0.0).sum(-1, dtype=final)
        logit = self.s.gather(1, self.label).squeeze(1).to(final)
        below = max_s.squeeze(1).to(final) - logit
        total = others + (-below).exp()
        stat[:, HARD_SUM], stat[:, MISS] = total, others / total
        nll = label_loss(others, below)
        smoothing = self.options.label_smoothing
        if smoothing > 0:
            smoothed = nll + smoothing * (logit - self.s.mean(-1, dtype=final))
            nll = torch.where(nll == torch.inf, nll, smoothed)  # inf - inf would be no loss
        return nll

    def write_gradient(self, stats: Tensor, grad_soft: Tensor, grad_hard: Tensor, out: Tensor) -> None:
        o = self.options
        stat = stats[self.span].unsqueeze(1)
        gradient = torch.zeros_like(self.s)
        if o.soft:
            gradient = self._soft_gradient(stat) * (grad_soft[self.span] * self.scale).unsqueeze(1)
        if o.hard:
            is_label = torch.arange(self.columns, device=self.s.device) == self.label
            rise = hard_gradient(self.s, is_label, stat, o.label_smoothing, self.columns)
            rise = torch.where(self.labelled.unsqueeze(1), rise, 0.0)
            gradient = gradient + rise * grad_hard[self.span].unsqueeze(1)
        rows = torch.zeros((len(self.span), out.shape[-1]), dtype=out.dtype, device=out.device)
        rows[:, : self.columns] = self._kept(self.counted, gradient.T).T.to(out.dtype)
        out[self.index] = rows

    def _columns(self, e_s: Tensor, e_t: Tensor, delta: Tensor, stat: Tensor) -> Columns:
        z_s, z_t, d = stat[..., STUDENT_SUM], stat[..., TEACHER_SUM], delta - stat[..., LOG_RATIO]
        p, q = e_t / z_t, e_s / z_s
        log_p = self._teacher_from(stat[..., TEACHER_MAX]) * self.scale - z_t.log()
        log_q = (self.s - stat[..., STUDENT_MAX]) * self.scale - z_s.log()
        return Columns(p, q, log_p, log_q, d, exact_difference(p, q, d))

    def _soft_gradient(self, stat: Tensor) -> Tensor:
        """Of the soft term, times tau."""
        if isinstance(self.divergence, LogitMSE):
            counts, difference = self._logit_difference()
            return torch.where(counts, (difference - stat[..., GROWTH]) * stat[..., TOP], 0.0)
        e_s, e_t, delta = self._pair(stat[..., STUDENT_MAX], stat[..., TEACHER_MAX])
        if self._exchanged:
            q, top = e_s / stat[..., STUDENT_SUM], stat[..., TOP]
            return torch.where(e_s == 0, q * top, q * (delta + top))
        if self.divergence.family is None:
            p, q = e_t / stat[..., TEACHER_SUM], e_s / stat[..., STUDENT_SUM]
            return exact_difference(p, q, delta - stat[..., LOG_RATIO])
        columns = self._columns(e_s, e_t, delta, stat)
        _, c = column_terms(self.divergence.family, columns)
        return torch.where(columns.q > 0.5, stat[..., TOP], c - columns.q * stat[..., GROWTH])

    def _logit_difference(self) -> tuple[Tensor, Tensor]:
        """Which columns count, and x - y of `LogitMSE`."""
        counts = (self.s != -torch.inf) & (self.t != -torch.inf)
        s, t = (torch.where(counts, x, 0.0) for x in (self.s, self.t))
        difference = s - t if self._one_temperature else s - t * self._teacher_factor
        return counts, difference * self.scale

    def _mean_squared_difference(self, stat: Tensor) -> Tensor:
        counts, difference = self._logit_difference()
        number = counts.sum(-1, dtype=stat.dtype)
        mean = difference.sum(-1, dtype=stat.dtype) / number * self.options.parameters[0]  # 1 if centred, else 0
        difference = torch.where(counts, difference - mean.unsqueeze(1), 0.0)
        stat[:, GROWTH], stat[:, TOP] = mean, 1 / number
        return difference.square().sum(-1, dtype=stat.dtype) / (2 * number)

    def _kept(self, rows: Tensor, values: Tensor) -> Tensor:
        """`values` [..., n] where `rows` says so, else exactly 0; NaN where the target is out of range."""
        return torch.where(self.valid, torch.where(rows, values, 0.0), torch.nan)


class _RestChunk(_Chunk):
    """For REST, all of it in float64: the ids stand where the teacher's logits would."""

    def _take(self, teacher: Tensor, dtype: torch.dtype) -> None:
        self.rounded = dtype
        self.s = self.s.to(exact_dtype(self.s.device))
        listed = torch.zeros((len(self.span), self.columns + 1), dtype=torch.bool, device=self.s.device)
        listed.scatter_(1, torch.where((teacher < 0) | (teacher > self.columns), self.columns, teacher), True)
        self.others = ~listed[:, :-1]

    def _centres(self) -> tuple[Tensor, Tensor]:
        lowest = torch.finfo(self.rounded).min  # the stats' float32 has no lower number
        of_others = _maximum(torch.where(self.others, self.s, -torch.inf))
        return _maximum(self.s).clamp(min=lowest), of_others.clamp(min=lowest)

    def _exponentials(self, centre: Tensor) -> Tensor:
        return torch.where(self.others, ((self.s - centre) * self.scale).exp(), 0.0)

    def _finish_soft(self, max_s: Tensor, max_t: Tensor, stat: Tensor) -> Tensor:
        total = self._exponentials(max_t).sum(-1, dtype=stat.dtype)
        stat[:, STUDENT_SUM] = total.to(self.rounded)
        stat[:, LOG_RATIO] = total - stat[:, STUDENT_SUM]
        return max_t.squeeze(1) * self.scale + total.log()

    def _soft_gradient(self, stat: Tensor) -> Tensor:
        e = self._exponentials(stat[..., TEACHER_MAX])
        return torch.where(e == 0, 0.0, e / (stat[..., STUDENT_SUM].to(e.dtype) + stat[..., LOG_RATIO]))


def label_loss(others: Tensor, below: Tensor) -> Tensor:
    """-log q1 at the label, which lies `below` the point from where the sum of all others is measured: a sure and right
    student keeps its digits."""
    own = (-below).exp()
    return torch.where(below < 30, (others / own).log1p(), below + (others + own).log())


def hard_gradient(s: Tensor, is_label: Tensor, stat: Tensor, label_smoothing: float, columns: int) -> Tensor:
    """Of the hard term at some of the `columns`, for logits [n, m] there and stats [n, 1, STATS]."""
    q1 = (s - stat[..., STUDENT_MAX]).exp() / stat[..., HARD_SUM]
    return torch.where(is_label, label_smoothing - stat[..., MISS], q1) - label_smoothing / columns


def exact_difference(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    """q - p without cancellation."""
    return torch.where(log_ratio.abs() < _SMALL, p * log_ratio.expm1(), q - p)


def _maximum(logits: Tensor) -> Tensor:
    """[n, 1]; finite for a row of -inf, so that its exponentials are 0 and not NaN."""
    return logits.amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)


def _without(apart: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """s - t - apart, taken off the one of s and t farther from 0: exact, if they are about that far apart."""
    off_s = torch.where(t > apart * -0.5, apart.clamp(min=0), apart.clamp(max=0))
    return (s - off_s) - (t + (apart - off_s))


def _on_grid(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 32768, (x * 256).round() / 256, x)


def _phi_over_delta(d: Tensor) -> Tensor:
    """(exp(d) - 1 - d) / d for |d| < 1/8."""
    if d.dtype == torch.float64:
        return torch.where(d == 0, 0.0, (d.expm1() - d) / d)
    return d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120))))
