"""The kernels of the Triton backend: how a row's logits reach `triton_math.py`, and its results memory.

`triton.py` launches them: `forward` and `backward` with a program for each section of a row, `finish` where a row has
several sections, and `fused` with a program for each row. A divergence that needs a second sweep has it in `forward`
and `fused`, but where a row has several sections in `sweep` and `finish_sweep`, after `finish`. `triton.py` has the
named tuples of their arguments, too: `Rows`, `Scalars`, and what the compiler knows, `Switches` and `Launch`.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fused_kd.backends import rows
from fused_kd.backends.triton_families import (
    SUMS,
    extended_sums,
    finished_sums,
    joined_sums,
    measured,
    merged_sums,
    no_sums,
    sums_of,
)
from fused_kd.backends.triton_math import (
    PARTS,
    Part,
    Stats,
    centre,
    extended,
    finished_hard,
    finished_soft,
    gradient,
    gradient_coefficients,
    joined,
    merged,
    nothing,
)
from fused_kd.backends.triton_memory import (
    UNKNOWN,
    columns_between,
    fill,
    floored,
    half_of,
    loaded,
    reader,
    row_start,
    tile_columns,
    tile_of,
)

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


class Row(NamedTuple):
    """A row of logits."""

    index: tl.tensor
    student: tl.tensor  # where its logits begin
    teacher: tl.tensor
    target: tl.tensor
    label: tl.tensor  # the column that the hard term counts as right, or -1: none
    vocabulary: tl.tensor  # how many columns both have
    sections: tl.tensor


@triton.jit
def row_of(index, target, student, teacher, vocabulary, sections, SWITCHES: tl.constexpr):
    student_row, teacher_row = row_start(student, index), row_start(teacher, index)
    label = tl.where(target >= 0, target, -1).to(tl.int32) if SWITCHES.hard else -1
    return Row(index, student_row, teacher_row, target, label, vocabulary, sections)


@triton.jit
def section_tiles(first, begin, end, last, label, SECTION: tl.constexpr, TILE: tl.constexpr):
    """Where the tiles of the section from column `first` on lie, counted from there: the plain ones, from `head` to
    `plain`, where the one at `plain` stands in for that at `labelled`; and how many are not plain, and where those end
    that are whole.

    Plain tiles lie between `begin` and `end` and do not hold the label: all but the first if the row begins within it,
    the label's, and the last if it is short. The `last` section takes all the rest.
    """
    length = tl.where(last, end - first, SECTION)
    whole = length // TILE * TILE
    head = tl.where((begin > first) & (whole > 0), TILE, 0)
    inside = (label >= first + head) & (label < first + whole)
    labelled = tl.where(inside, (label - first) // TILE * TILE, whole)
    edges = (head > 0).to(tl.int32) + inside.to(tl.int32) + (length > whole).to(tl.int32)
    return head, whole - tl.where(inside, TILE, 0), labelled, edges, whole


@triton.jit
def edge_tile(i, head, labelled, whole):
    """Where the i-th tile lies of those that are not plain."""
    left = i - (head > 0).to(tl.int32)
    return tl.where(left < 0, 0, tl.where(left == 0, labelled, whole))


@triton.jit
def readers(
    student, teacher, LANES: tl.constexpr, VECTOR: tl.constexpr, SHIFTED: tl.constexpr, HALF: tl.constexpr = UNKNOWN
):
    """Those of both logits."""
    return reader(student, LANES, VECTOR, SHIFTED, HALF), reader(teacher, LANES, VECTOR, SHIFTED, HALF)


@triton.jit
def no_part(like, scalars, SWITCHES: tl.constexpr):
    part = nothing(like)
    return part, centre(part.point_s, part.point_t, scalars, SWITCHES)


@triton.jit
def with_tile(
    state, both, start, within, row, at, scalars, SWITCHES: tl.constexpr, LAUNCH: tl.constexpr, EDGE: tl.constexpr,
    KEPT: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """The lanes' state with the tile from column `start` on. `both`: the readers."""
    BOTH: tl.constexpr = SWITCHES.soft or SECOND
    s = tile_of(both[0], start, row.vocabulary, LAUNCH.groups, LAUNCH.vector, EDGE, KEPT)
    t = tile_of(both[1], start, row.vocabulary, LAUNCH.groups, LAUNCH.vector, EDGE, KEPT) if BOTH else s
    if SECOND:
        state = extended_sums(state, s, t, at, scalars, SWITCHES)
    else:
        state = extended(state[0], state[1], s, t, start + within, row.vocabulary, row.label, scalars, SWITCHES, EDGE)
    return state


@triton.jit
def swept(
    row, section, at, scalars, SWITCHES: tl.constexpr, LAUNCH: tl.constexpr, KEPT: tl.constexpr,
    SECOND: tl.constexpr,
):  # fmt: skip
    """What the lanes make of one section of a row: their parts and centres or, in the SECOND sweep, their sums. There
    `at` makes p and q of logits."""
    LANES: tl.constexpr = LAUNCH.lanes  # (In a list, Triton 3.6 wants a name.)
    TILE: tl.constexpr = LAUNCH.groups * LANES * LAUNCH.vector
    first = section * LAUNCH.section
    last = section == row.sections - 1
    head, plain, labelled, edges, whole = section_tiles(first, 0, row.vocabulary, last, row.label, LAUNCH.section, TILE)
    within = tile_columns(0, LAUNCH.groups, LANES, LAUNCH.vector)
    none = tl.zeros([LANES], tl.float32)
    state = no_sums(none, SWITCHES) if SECOND else no_part(none, scalars, SWITCHES)
    # Where rows lie alike, there is a loop for each half of 16 bytes that they may begin in, and all but one are empty:
    # a choice between registers would cost an instruction a pair.
    HALVES: tl.constexpr = LAUNCH.shifted and LAUNCH.alike and row.student.dtype == row.teacher.dtype
    for HALF in tl.static_range(0 if HALVES else UNKNOWN, UNKNOWN if HALVES else UNKNOWN + 1):
        both = readers(row.student, row.teacher, LANES, LAUNCH.vector, LAUNCH.shifted, HALF)
        here = tl.where(half_of(row.student) == HALF, plain, 0) if HALVES else plain
        for i in range(first, first + here, TILE):
            start = tl.where(i == first + labelled, first + plain, i)
            state = with_tile(state, both, start, within, row, at, scalars, SWITCHES, LAUNCH, False, KEPT, SECOND)
    both = readers(row.student, row.teacher, LANES, LAUNCH.vector, LAUNCH.shifted)
    for i in range(edges):
        start = first + edge_tile(i, head, labelled, whole)
        state = with_tile(state, both, start, within, row, at, scalars, SWITCHES, LAUNCH, True, KEPT, SECOND)
    return state


@triton.jit
def section_part(row, section, scalars, SWITCHES: tl.constexpr, LAUNCH: tl.constexpr, KEPT: tl.constexpr):
    """What one section of a row comes to."""
    if SWITCHES.soft or SWITCHES.hard:
        part, own = swept(row, section, (), scalars, SWITCHES, LAUNCH, KEPT, SECOND=False)
        part = merged(part, own, scalars, SWITCHES)
    else:
        part = nothing(scalars.smoothing)
    return part


@triton.jit
def section_sums(row, section, stats, scalars, SWITCHES: tl.constexpr, LAUNCH: tl.constexpr, KEPT: tl.constexpr):
    """What one section of a row comes to in the second sweep."""
    at = measured(stats, scalars, SWITCHES)
    return merged_sums(swept(row, section, at, scalars, SWITCHES, LAUNCH, KEPT, SECOND=True), SWITCHES)


@triton.jit
def finish_sums(sums, stats, row, kl, scalars, soft, SWITCHES: tl.constexpr):
    """Writes the soft term of a divergence that needs a second sweep; gives the row's stats. `kl`: the first one's."""
    value, growth, top = finished_sums(sums, measured(stats, scalars, SWITCHES), row.vocabulary, kl, SWITCHES)
    tl.store(soft + row.index, value)
    point_s, point_t, student_sum, teacher_sum, log_ratio, hard_sum, miss, _, _ = stats
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
        parts += index.to(tl.int64) * sections * SUMS
        sums = no_sums(kept.point_s, SWITCHES)
        for section in range(sections):
            next_sums = sums_of(load_all(parts + section * SUMS, SUMS), SWITCHES)
            sums = joined_sums(sums, next_sums, SWITCHES)
        store_all(at, finish_sums(sums, kept, row, tl.load(soft + index), scalars, soft, SWITCHES))


@triton.jit
def tile_gradient(
    both, start, begin, end, within, label, coefficients, scalars, SWITCHES: tl.constexpr, VECTOR: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """The gradient of the vectors from `start` on. `both`: the readers."""
    FINE: tl.constexpr = both[0][0].dtype.element_ty == tl.float32
    s = loaded(both[0], start, begin, end, VECTOR, EDGE, False)
    BOTH: tl.constexpr = SWITCHES.soft or SWITCHES.family != ""
    t = loaded(both[1], start, begin, end, VECTOR, EDGE, False) if BOTH else s
    return gradient(s, t, start + within, label, coefficients, scalars, SWITCHES, FINE, EDGE)


@triton.jit
def section_gradient(row, out, section, coefficients, scalars, SWITCHES: tl.constexpr, LAUNCH: tl.constexpr):
    """Writes the gradient of one section of a row; `out` may be the student's logits themselves.

    Columns are counted from a multiple of a vector's bytes of `out`, at or before its first. Where rows lie alike, it
    is one of the logits' too.
    """
    VECTORS: tl.constexpr = LAUNCH.groups * LAUNCH.lanes
    VECTOR: tl.constexpr = LAUNCH.vector
    TILE: tl.constexpr = VECTORS * VECTOR
    SHIFTED: tl.constexpr = not LAUNCH.alike
    aligned = floored(out, VECTOR * (out.dtype.element_ty.primitive_bitwidth // 8))
    begin = columns_between(aligned, out)
    end = begin + row.vocabulary
    label = tl.where(row.label >= 0, begin + row.label, -1)
    first = section * LAUNCH.section
    last = section == row.sections - 1
    head, plain, labelled, edges, whole = section_tiles(first, begin, end, last, label, LAUNCH.section, TILE)
    # VECTOR wide, so that logits of both dtypes lie in the threads alike. From the first tile, so that the loop has
    # one number to add.
    student_at, teacher_at, out_at = row.student - begin + first, row.teacher - begin + first, aligned + first
    both = readers(student_at, teacher_at, VECTORS, VECTOR, SHIFTED)
    within = tile_columns(first, 1, VECTORS, VECTOR)
    out_tile = reader(out_at, VECTORS, VECTOR, False, UNKNOWN)[0][:, None] + tl.arange(0, VECTOR)[None, :]
    begin -= first
    end -= first
    for i in range(head, plain, TILE):
        start = tl.where(i == labelled, plain, i)
        g = tile_gradient(both, start, begin, end, within, label, coefficients, scalars, SWITCHES, VECTOR, False)
        tl.store(out_tile + start, g, cache_modifier=".cs")
    for i in range(edges):  # their whole vectors
        start = edge_tile(i, head, labelled, whole)
        g = tile_gradient(both, start, begin, end, within, label, coefficients, scalars, SWITCHES, VECTOR, True)
        vector = start + tl.arange(0, VECTORS) * VECTOR
        inside = (vector >= begin) & (vector + VECTOR <= end)
        tl.store(out_tile + start, g, mask=inside[:, None], cache_modifier=".cs")
    # The row's first and last columns, where they do not fill a vector. Those of the logits may lie at any address.
    ragged_end = last & (end % VECTOR > 0) & ((begin <= 0) | (end >= VECTOR))
    for i in range(tl.where(begin > 0, 0, 1), tl.where(ragged_end, 2, 1)):
        start = tl.where(i == 0, 0, end // VECTOR * VECTOR)
        one = readers(student_at + start, teacher_at + start, 1, VECTOR, SHIFTED)
        columns = tile_columns(start, 1, 1, VECTOR)
        g = tile_gradient(
            one, 0, begin - start, end - start, first + columns, label, coefficients, scalars, SWITCHES, VECTOR, True
        )
        tl.store(out_at + columns, g, mask=(columns >= begin) & (columns < end))


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
                    sums = joined_sums(sums, next_sums, SWITCHES)
            stats = finish_sums(sums, stats, row, kl, scalars, soft, SWITCHES)
        coefficients = coefficients_of(stats, index, target, coef_soft, coef_hard, vocabulary, scalars, SWITCHES)
        for i in range(sections):
            section_gradient(row, out_row, sections - 1 - i, coefficients, scalars, SWITCHES, LAUNCH)
    else:
        finish_unread_row(index, target, soft, hard)
        fill(out_row, 0, vocabulary, unread_value(target), TILE)
    fill(out_row, vocabulary, width, 0.0, TILE)
