"""The sections of a row: how their tiles reach the mathematics, in the forward, in the second sweep and backward.

A section is a fixed number of columns, read by one program in tiles. Those that lie inside the row and do not hold the
label are plain, and have a loop without masks.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fused_kd.backends.triton_families import extended_sums, measured, merged_sums, no_sums
from fused_kd.backends.triton_gradient import gradient
from fused_kd.backends.triton_math import centre, extended, merged, nothing
from fused_kd.backends.triton_memory import (
    UNKNOWN,
    columns_between,
    floored,
    half_of,
    loaded,
    reader,
    row_start,
    tile_columns,
    tile_of,
)
from fused_kd.backends.triton_rest import section_rest


class Row(NamedTuple):
    """A row of logits."""

    index: tl.tensor
    student: tl.tensor  # where its logits begin
    teacher: tl.tensor  # of REST: its ids
    teacher_stride: tl.tensor  # of REST: how many there are
    target: tl.tensor
    label: tl.tensor  # the column that the hard term counts as right, or -1: none
    vocabulary: tl.tensor  # how many columns both have
    sections: tl.tensor


@triton.jit
def row_of(index, target, student, teacher, vocabulary, sections, SWITCHES: tl.constexpr):
    student_row, teacher_row = row_start(student, index), row_start(teacher, index)
    label = tl.where(target >= 0, target, -1).to(tl.int32) if SWITCHES.hard else -1
    stride = teacher.layout[len(teacher.layout) - 1]
    return Row(index, student_row, teacher_row, stride, target, label, vocabulary, sections)


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
    if SWITCHES.family == "rest":
        sums = section_rest(row, section, scalars, LAUNCH, KEPT)
    else:
        at = measured(stats, scalars, SWITCHES)
        sums = swept(row, section, at, scalars, SWITCHES, LAUNCH, KEPT, SECOND=True)
        sums = merged_sums(sums, scalars, SWITCHES)
    return sums


@triton.jit
def tile_gradient(
    both, start, begin, end, within, label, coefficients, scalars, SWITCHES: tl.constexpr, VECTOR: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """The gradient of the vectors from `start` on. `both`: the readers."""
    FINE: tl.constexpr = both[0][0].dtype.element_ty == tl.float32
    s = loaded(both[0], start, begin, end, VECTOR, EDGE, False)
    BOTH: tl.constexpr = SWITCHES.soft or (SWITCHES.family != "" and SWITCHES.family != "rest")
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
