"""The kernels of the Triton backend: what a program does, and where its results go.

`triton.py` launches them: `forward` and `backward` with a program for each section of a row, `finish` where a row has
several sections, and `fused` with a program for each row. A divergence that needs a second sweep has it in `forward`
and `fused`, but where a row has several sections in `sweep` and `finish_sweep`, after `finish`; by itself it is `sweep`
and `finish_terms`. `triton.py` has the named tuples of their arguments, too: `Rows`, `Scalars`, and what the compiler
knows, `Switches` and `Launch`.
"""

import triton
import triton.language as tl

from fused_kd.backends import rows
from fused_kd.backends.triton_families import SUMS, finished_sums, joined_sums, measured, no_sums, sums_of
from fused_kd.backends.triton_gradient import gradient_coefficients
from fused_kd.backends.triton_math import (
    PARTS,
    Part,
    Stats,
    finished_hard,
    finished_soft,
    joined,
    nothing,
)
from fused_kd.backends.triton_memory import fill, row_start
from fused_kd.backends.triton_rest import log_rest
from fused_kd.backends.triton_sections import row_of, section_gradient, section_part, section_sums

SKIP = tl.constexpr(rows.SKIP)
NO_LABEL = tl.constexpr(rows.NO_LABEL)
STATS = tl.constexpr(rows.STATS)


@triton.jit
def readable(target, vocabulary):
    """Whether the row has a term. If not it is skipped, or its label is out of range."""
    return ((target >= 0) & (target < vocabulary)) | (target == NO_LABEL)


@triton.jit
def unread_value(target):
    return tl.where(target == SKIP, 0.0, float("nan"))


@triton.jit
def finish_sums(sums, stats, row, kl, scalars, soft, SWITCHES: tl.constexpr):
    """Writes the soft term of a divergence that needs a second sweep; gives the row's stats. `kl`: the first one's."""
    point_s, point_t, student_sum, teacher_sum, log_ratio, hard_sum, miss, growth, top = stats
    if SWITCHES.family == "rest":
        value = log_rest(sums, scalars)
        point_t, student_sum, log_ratio, _ = sums
    else:
        value, growth, top = finished_sums(sums, measured(stats, scalars, SWITCHES), row.vocabulary, kl, SWITCHES)
    tl.store(soft + row.index, value)
    return Stats(point_s, point_t, student_sum, teacher_sum, log_ratio, hard_sum, miss, growth, top)


@triton.jit
def finish_row(part, row, scalars, soft, hard, SWITCHES: tl.constexpr):
    """Writes the row's terms; gives its stats, and the soft one."""
    zero = part.point_s * 0.0
    soft_value, student_sum, teacher_sum, log_ratio, top = zero, zero, zero, zero, zero
    hard_value, hard_sum, miss = zero, zero, zero
    if SWITCHES.soft:
        soft_value, student_sum, teacher_sum, log_ratio, top = finished_soft(part, scalars, SWITCHES)
        # In one column both probabilities are 1, whatever the last bit says. (NaN stays.)
        soft_value *= tl.where((row.vocabulary == 1) & (soft_value < 1), 0.0, 1.0)
    if SWITCHES.hard:
        if row.target >= 0:
            logit = tl.load(row.student + row.target).to(tl.float32)
            hard_value, hard_sum, miss = finished_hard(part, logit, row.vocabulary, scalars, SWITCHES)
    tl.store(soft + row.index, soft_value)
    tl.store(hard + row.index, hard_value)
    stats = Stats(part.point_s, part.point_t, student_sum, teacher_sum, log_ratio, hard_sum, miss, zero, top)
    return stats, soft_value


@triton.jit
def finish_unread_row(index, target, soft, hard):
    """The same for a row without a term."""
    value = unread_value(target)
    tl.store(soft + index, value)
    tl.store(hard + index, value)
    return Stats(value, value, value, value, value, value, value, value, value)


@triton.jit
def load_all(at, COUNT: tl.constexpr):
    values = ()
    for i in tl.static_range(COUNT):
        values += (tl.load(at + i),)  # type: ignore[assignment]
    return values


@triton.jit
def store_all(at, values):
    for i in tl.static_range(len(values)):
        tl.store(at + i, values[i])


@triton.jit
def forward(
    student,
    teacher,
    targets,
    soft,
    hard,
    stats,
    parts,
    vocabulary,
    sections,
    scalars,
    SWITCHES: tl.constexpr,
    LAUNCH: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One section of one row. WHOLE: it is the whole row; else `finish` puts the row's sections together."""
    index = tl.program_id(0) // sections
    section = tl.program_id(0) % sections
    target = tl.load(row_start(targets, index))
    at = stats + index.to(tl.int64) * STATS
    if readable(target, vocabulary):
        row = row_of(index, target, student, teacher, vocabulary, sections, SWITCHES)
        part = section_part(row, section, scalars, SWITCHES, LAUNCH, KEPT=False)
        if WHOLE:
            kept, kl = finish_row(part, row, scalars, soft, hard, SWITCHES)
            if SWITCHES.second:
                sums = section_sums(row, section, kept, scalars, SWITCHES, LAUNCH, KEPT=False)
                kept = finish_sums(sums, kept, row, kl, scalars, soft, SWITCHES)
            store_all(at, kept)
        else:
            store_all(parts + tl.program_id(0).to(tl.int64) * PARTS, part)
    elif WHOLE:
        store_all(at, finish_unread_row(index, target, soft, hard))


@triton.jit
def finish(
    student,
    teacher,
    targets,
    soft,
    hard,
    stats,
    parts,
    vocabulary,
    sections,
    scalars,
    SWITCHES: tl.constexpr,
):
    """Puts the sections of a row together, from left to right."""
    index = tl.program_id(0)
    target = tl.load(row_start(targets, index))
    at = stats + index.to(tl.int64) * STATS
    if readable(target, vocabulary):
        row = row_of(index, target, student, teacher, vocabulary, sections, SWITCHES)
        parts += index.to(tl.int64) * sections * PARTS
        part = nothing(scalars.smoothing)
        for section in range(sections):
            next_part = Part(*load_all(parts + section * PARTS, PARTS))
            part = joined(part, next_part, scalars, SWITCHES)
        kept, _ = finish_row(part, row, scalars, soft, hard, SWITCHES)
        store_all(at, kept)
    else:
        store_all(at, finish_unread_row(index, target, soft, hard))


@triton.jit
def sweep(
    student,
    teacher,
    targets,
    soft,
    hard,
    stats,
    parts,
    vocabulary,
    sections,
    scalars,
    SWITCHES: tl.constexpr,
    LAUNCH: tl.constexpr,
):
    """The second sweep over one section of one row that `finish` has finished."""
    index = tl.program_id(0) // sections
    section = tl.program_id(0) % sections
    target = tl.load(row_start(targets, index))
    if readable(target, vocabulary):
        row = row_of(index, target, student, teacher, vocabulary, sections, SWITCHES)
        kept = Stats(*load_all(stats + index.to(tl.int64) * STATS, STATS))
        sums = section_sums(row, section, kept, scalars, SWITCHES, LAUNCH, KEPT=False)
        store_all(parts + tl.program_id(0).to(tl.int64) * SUMS, sums)


@triton.jit
def swept_sums(parts, index, sections, stats, scalars, SWITCHES: tl.constexpr):
    """Those of a row, from what `sweep` found in its sections."""
    parts += index.to(tl.int64) * sections * SUMS
    sums = no_sums(stats.point_s, SWITCHES)
    for section in range(sections):
        next_sums = sums_of(load_all(parts + section * SUMS, SUMS), SWITCHES)
        sums = joined_sums(sums, next_sums, scalars, SWITCHES)
    return sums


@triton.jit
def finish_sweep(
    student,
    teacher,
    targets,
    soft,
    hard,
    stats,
    parts,
    vocabulary,
    sections,
    scalars,
    SWITCHES: tl.constexpr,
):
    """Puts the sections of a row together, from left to right."""
    index = tl.program_id(0)
    target = tl.load(row_start(targets, index))
    at = stats + index.to(tl.int64) * STATS
    if readable(target, vocabulary):
        row = row_of(index, target, student, teacher, vocabulary, sections, SWITCHES)
        kept = Stats(*load_all(at, STATS))
        sums = swept_sums(parts, index, sections, kept, scalars, SWITCHES)
        store_all(at, finish_sums(sums, kept, row, tl.load(soft + index), scalars, soft, SWITCHES))


@triton.jit
def finish_terms(targets, stats, parts, out, vocabulary, sections, scalars, SWITCHES: tl.constexpr):
    """The sums themselves, [N, SUMS], for a row of which these are some of the columns."""
    index = tl.program_id(0)
    target = tl.load(row_start(targets, index))
    out += index.to(tl.int64) * SUMS
    if readable(target, vocabulary):
        kept = Stats(*load_all(stats + index.to(tl.int64) * STATS, STATS))
        sums = swept_sums(parts, index, sections, kept, scalars, SWITCHES)
        scale = measured(kept, scalars, SWITCHES).scale
        store_all(out, (sums.value * scale, sums.growth * scale, sums.rest_growth * scale, sums.rest_q))
    else:
        value = unread_value(target)
        store_all(out, (value, value, value, value))


@triton.jit
def coefficients_of(stats, index, target, coef_soft, coef_hard, vocabulary, scalars, SWITCHES: tl.constexpr):
    soft, hard = tl.load(row_start(coef_soft, index)), tl.load(row_start(coef_hard, index))
    return gradient_coefficients(stats, target, soft, hard, vocabulary, scalars, SWITCHES)


@triton.jit
def backward(
    student,
    teacher,
    targets,
    stats,
    coef_soft,
    coef_hard,
    out,
    vocabulary,
    width,
    sections,
    scalars,
    SWITCHES: tl.constexpr,
    LAUNCH: tl.constexpr,
):
    """The gradient of one section of one row. `out` has `width` columns: 0 in those that the teacher lacks."""
    index = tl.program_id(0) // sections
    section = tl.program_id(0) % sections
    target = tl.load(row_start(targets, index))
    out_row = row_start(out, index)
    TILE: tl.constexpr = LAUNCH.groups * LAUNCH.lanes * LAUNCH.vector
    if readable(target, vocabulary):
        kept = Stats(*load_all(stats + index.to(tl.int64) * STATS, STATS))
        coefficients = coefficients_of(kept, index, target, coef_soft, coef_hard, vocabulary, scalars, SWITCHES)
        row = row_of(index, target, student, teacher, vocabulary, sections, SWITCHES)
        section_gradient(row, out_row, section, coefficients, scalars, SWITCHES, LAUNCH)
    else:
        first = section * LAUNCH.section
        fill(out_row, first, tl.minimum(first + LAUNCH.section, vocabulary), unread_value(target), TILE)
    if section == sections - 1:
        fill(out_row, vocabulary, width, 0.0, TILE)


@triton.jit
def fused(
    student,
    teacher,
    targets,
    soft,
    hard,
    coef_soft,
    coef_hard,
    out,
    vocabulary,
    width,
    sections,
    scalars,
    SWITCHES: tl.constexpr,
    LAUNCH: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A row's terms and its gradient in one visit: the sections read last, and still in the cache, come first again."""
    index = tl.program_id(0)
    target = tl.load(row_start(targets, index))
    out_row = row_start(out, index)
    TILE: tl.constexpr = LAUNCH.groups * LAUNCH.lanes * LAUNCH.vector
    if readable(target, vocabulary):
        row = row_of(index, target, student, teacher, vocabulary, sections, SWITCHES)
        if WHOLE:
            part = section_part(row, 0, scalars, SWITCHES, LAUNCH, KEPT=True)
        else:
            part = nothing(scalars.smoothing)
            for section in range(sections):
                next_part = section_part(row, section, scalars, SWITCHES, LAUNCH, KEPT=True)
                part = joined(part, next_part, scalars, SWITCHES)
        stats, kl = finish_row(part, row, scalars, soft, hard, SWITCHES)
        if SWITCHES.second:
            sums = section_sums(row, 0, stats, scalars, SWITCHES, LAUNCH, KEPT=True)
            if not WHOLE:
                for section in range(1, sections):
                    next_sums = section_sums(row, section, stats, scalars, SWITCHES, LAUNCH, KEPT=True)
                    sums = joined_sums(sums, next_sums, scalars, SWITCHES)
            stats = finish_sums(sums, stats, row, kl, scalars, soft, SWITCHES)
        coefficients = coefficients_of(stats, index, target, coef_soft, coef_hard, vocabulary, scalars, SWITCHES)
        for i in range(sections):
            section_gradient(row, out_row, sections - 1 - i, coefficients, scalars, SWITCHES, LAUNCH)
    else:
        finish_unread_row(index, target, soft, hard)
        fill(out_row, 0, vocabulary, unread_value(target), TILE)
    fill(out_row, vocabulary, width, 0.0, TILE)
