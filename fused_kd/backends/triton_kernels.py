"""The kernels of the Triton backend: how a row's logits reach `triton_math.py`, and its results memory.

`triton.py` launches them: `forward` and `backward` with a program for each section of a row, `finish` where a row has
several sections, and `fused` with a program for each row.
"""

import triton
import triton.language as tl

from fused_kd.backends import rows
from fused_kd.backends.triton_math import (
    PARTS,
    centre,
    extended,
    finished_hard,
    finished_soft,
    gradient,
    gradient_scales,
    joined,
    merged,
    nothing,
)

SKIP = tl.constexpr(rows.SKIP)
NO_LABEL = tl.constexpr(rows.NO_LABEL)
STATS = tl.constexpr(rows.STATS)


@triton.jit
def row_start(row, layout):
    """The offset of a row: layout is stride, size, stride, size, ..., stride of the leading dimensions, last first."""
    start = (row * 0).to(tl.int64)
    for i in tl.static_range(len(layout) // 2):
        start += (row % layout[2 * i + 1]).to(tl.int64) * layout[2 * i]
        row = row // layout[2 * i + 1]
    return start + row.to(tl.int64) * layout[len(layout) - 1]


@triton.jit
def readable(target, vocabulary):
    """Whether the row has a term. If not it is skipped, or its label is out of range."""
    return ((target >= 0) & (target < vocabulary)) | (target == NO_LABEL)


@triton.jit
def unread_value(target):
    return tl.where(target == SKIP, 0.0, float("nan"))


@triton.jit
def label_of(target, HARD: tl.constexpr):
    """The column of the label, or -1: no column."""
    return tl.where(target >= 0, target, -1).to(tl.int32) if HARD else -1


@triton.jit
def beside(a, b):
    """Two tiles [LANES, n] as one [LANES, 2 n], within the lanes: the order of the columns is nobody's business."""
    return tl.reshape(tl.join(a, b), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def group_columns(LANES: tl.constexpr, VECTOR: tl.constexpr):
    return tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def tile_columns(GROUPS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The columns of a tile, laid out as `tile_of` lays out the logits."""
    columns = group_columns(LANES, VECTOR)
    if GROUPS > 1:
        columns = beside(columns, LANES * VECTOR + columns)
    if GROUPS > 2:
        columns = beside(columns, 2 * LANES * VECTOR + columns)
    tl.static_assert(GROUPS <= 4 and GROUPS != 3)
    return columns


@triton.jit
def section_tiles(section, vocabulary, label, SECTION: tl.constexpr, TILE: tl.constexpr):
    """What a section consists of: its first column, how many tiles are plain, which tile is not, and how many are not.

    Plain tiles lie within the row and do not hold the label: all but the label's, and the last if it is short.
    """
    first = section * SECTION
    length = tl.minimum(vocabulary - first, SECTION)
    whole = length // TILE
    inside = (label >= first) & (label < first + whole * TILE)
    labelled = tl.where(inside, (label - first) // TILE, whole)
    edges = inside.to(tl.int32) + (length % TILE > 0).to(tl.int32)
    return first, whole - inside.to(tl.int32), labelled, edges, whole


@triton.jit
def loaded(row, start, within, end, EDGE: tl.constexpr, KEPT: tl.constexpr):
    """Logits in float32, -inf from `end` on. KEPT in the cache: they will be read again."""
    at = row + start + within
    POLICY: tl.constexpr = "evict_last" if KEPT else "evict_first"
    if EDGE:
        x = tl.load(at, mask=start + within < end, other=-float("inf"), eviction_policy=POLICY)
    else:
        x = tl.load(at, eviction_policy=POLICY)
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def tile_of(
    row,
    start,
    end,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    EDGE: tl.constexpr,
    KEPT: tl.constexpr,
):
    GROUP: tl.constexpr = LANES * VECTOR
    within = group_columns(LANES, VECTOR)
    x = loaded(row, start, within, end, EDGE, KEPT)
    if GROUPS > 1:
        x = beside(x, loaded(row, start + GROUP, within, end, EDGE, KEPT))
    if GROUPS > 2:
        y = loaded(row, start + 2 * GROUP, within, end, EDGE, KEPT)
        x = beside(x, beside(y, loaded(row, start + 3 * GROUP, within, end, EDGE, KEPT)))
    return x


@triton.jit
def section_part(
    student,
    teacher,
    section,
    label,
    vocabulary,
    k,
    k_t,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    EXACT: tl.constexpr,
    ROOT: tl.constexpr,
    POWER: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    SECTION: tl.constexpr,
    KEPT: tl.constexpr,
):
    """What one section of a row comes to."""
    TILE: tl.constexpr = GROUPS * LANES * VECTOR
    first, plain, labelled, edges, last = section_tiles(section, vocabulary, label, SECTION, TILE)
    within = tile_columns(GROUPS, LANES, VECTOR)
    part = nothing(tl.zeros([LANES], tl.float32))
    own = centre(part[0], part[1], k, k_t, EXACT, ROOT)
    for i in range(plain):
        start = first + (i + (i >= labelled).to(tl.int32)) * TILE
        s = tile_of(student, start, vocabulary, GROUPS, LANES, VECTOR, False, KEPT)
        t = tile_of(teacher, start, vocabulary, GROUPS, LANES, VECTOR, False, KEPT) if SOFT else s
        part, own = extended(
            part, own, s, t, start + within, vocabulary, label, k, k_t,
            SOFT, HARD, ENTROPY, SMOOTHED, EXACT, ROOT, POWER, False,
        )  # fmt: skip
    for i in range(edges):
        start = first + tl.where(i == 0, labelled, last) * TILE
        s = tile_of(student, start, vocabulary, GROUPS, LANES, VECTOR, True, KEPT)
        t = tile_of(teacher, start, vocabulary, GROUPS, LANES, VECTOR, True, KEPT) if SOFT else s
        part, own = extended(
            part, own, s, t, start + within, vocabulary, label, k, k_t,
            SOFT, HARD, ENTROPY, SMOOTHED, EXACT, ROOT, POWER, True,
        )  # fmt: skip
    return merged(part, own, k, k_t, SOFT, EXACT, ROOT, POWER)


@triton.jit
def finish_row(
    part,
    student,
    row,
    target,
    vocabulary,
    k,
    k_t,
    smoothing,
    soft,
    hard,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    EXACT: tl.constexpr,
    ROOT: tl.constexpr,
    POWER: tl.constexpr,
):
    """Writes the row's terms; gives its stats, in their order."""
    zero = part[0] * 0.0
    soft_value, student_sum, teacher_sum, log_ratio = zero, zero, zero, zero
    hard_value, hard_sum, miss = zero, zero, zero
    if SOFT:
        soft_value, student_sum, teacher_sum, log_ratio = finished_soft(part, k, k_t, ENTROPY, EXACT, ROOT)
        # In one column both probabilities are 1, whatever the last bit says. (NaN stays.)
        soft_value *= tl.where((vocabulary == 1) & (soft_value < 1), 0.0, 1.0)
    if HARD:
        if target >= 0:
            logit = tl.load(student + target).to(tl.float32)
            hard_value, hard_sum, miss = finished_hard(
                part, logit, vocabulary, smoothing, k, SMOOTHED, EXACT, ROOT, POWER
            )
    tl.store(soft + row, soft_value)
    tl.store(hard + row, hard_value)
    return part[0], part[1], student_sum, teacher_sum, log_ratio, hard_sum, miss


@triton.jit
def finish_unread_row(row, target, soft, hard):
    """The same for a row without a term."""
    value = unread_value(target)
    tl.store(soft + row, value)
    tl.store(hard + row, value)
    return value, value, value, value, value, value, value


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
    student_layout,
    teacher_layout,
    targets_stride,
    vocabulary,
    sections,
    k,
    k_t,
    smoothing,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    EXACT: tl.constexpr,
    ROOT: tl.constexpr,
    POWER: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    SECTION: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One section of one row. WHOLE: it is the whole row; else `finish` puts the row's sections together."""
    row = tl.program_id(0) // sections
    section = tl.program_id(0) % sections
    target = tl.load(targets + row.to(tl.int64) * targets_stride)
    if readable(target, vocabulary):
        student += row_start(row, student_layout)
        teacher += row_start(row, teacher_layout)
        part = section_part(
            student, teacher, section, label_of(target, HARD), vocabulary, k, k_t, SOFT, HARD, ENTROPY, SMOOTHED,
            EXACT, ROOT, POWER, GROUPS, LANES, VECTOR, SECTION, False,
        )  # fmt: skip
        if WHOLE:
            values = finish_row(
                part, student, row, target, vocabulary, k, k_t, smoothing, soft, hard,
                SOFT, HARD, ENTROPY, SMOOTHED, EXACT, ROOT, POWER,
            )  # fmt: skip
            store_all(stats + row.to(tl.int64) * STATS, values)
        else:
            store_all(parts + tl.program_id(0).to(tl.int64) * PARTS, part)
    elif WHOLE:
        store_all(stats + row.to(tl.int64) * STATS, finish_unread_row(row, target, soft, hard))


@triton.jit
def finish(
    student,
    targets,
    soft,
    hard,
    stats,
    parts,
    student_layout,
    targets_stride,
    vocabulary,
    sections,
    k,
    k_t,
    smoothing,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    EXACT: tl.constexpr,
    ROOT: tl.constexpr,
    POWER: tl.constexpr,
):
    """Puts the sections of a row together, from left to right."""
    row = tl.program_id(0)
    target = tl.load(targets + row.to(tl.int64) * targets_stride)
    if readable(target, vocabulary):
        parts += row.to(tl.int64) * sections * PARTS
        part = nothing(smoothing)
        for section in range(sections):
            at = parts + section * PARTS
            next_part = (
                tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4),
                tl.load(at + 5), tl.load(at + 6), tl.load(at + 7), tl.load(at + 8),
            )  # fmt: skip
            part = joined(part, next_part, k, k_t, SOFT, EXACT, ROOT, POWER)
        values = finish_row(
            part, student + row_start(row, student_layout), row, target, vocabulary, k, k_t, smoothing, soft, hard,
            SOFT, HARD, ENTROPY, SMOOTHED, EXACT, ROOT, POWER,
        )  # fmt: skip
        store_all(stats + row.to(tl.int64) * STATS, values)
    else:
        store_all(stats + row.to(tl.int64) * STATS, finish_unread_row(row, target, soft, hard))


@triton.jit
def section_gradient(
    student,
    teacher,
    out,
    section,
    label,
    vocabulary,
    scales,
    k,
    k_t,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTHED: tl.constexpr,
    EXACT: tl.constexpr,
    ROOT: tl.constexpr,
    POWER: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    SECTION: tl.constexpr,
):
    """Writes the gradient of one section of a row; `out` may be the student's logits themselves."""
    TILE: tl.constexpr = GROUPS * LANES * VECTOR
    FINE: tl.constexpr = out.dtype.element_ty.primitive_bitwidth == 32
    first, plain, labelled, edges, last = section_tiles(section, vocabulary, label, SECTION, TILE)
    # VECTOR wide, so that logits of both dtypes lie in the threads alike.
    within = group_columns(GROUPS * LANES, VECTOR)
    # Addresses of the first tile, so that the loop has one number to add.
    student_tile, teacher_tile, out_tile = student + first + within, teacher + first + within, out + first + within
    for i in range(plain):
        start = (i + (i >= labelled).to(tl.int32)) * TILE
        s = loaded(student_tile, start, 0, vocabulary, False, False)
        t = loaded(teacher_tile, start, 0, vocabulary, False, False) if SOFT else s
        columns = first + start + within
        g = gradient(s, t, columns, label, scales, k, k_t, SOFT, HARD, SMOOTHED, EXACT, ROOT, POWER, FINE, False)
        tl.store(out_tile + start, g.to(out.dtype.element_ty), cache_modifier=".cs")
    for i in range(edges):
        start = first + tl.where(i == 0, labelled, last) * TILE
        s = loaded(student, start, within, vocabulary, True, False)
        t = loaded(teacher, start, within, vocabulary, True, False) if SOFT else s
        g = gradient(s, t, start + within, label, scales, k, k_t, SOFT, HARD, SMOOTHED, EXACT, ROOT, POWER, FINE, True)
        inside = start + within < vocabulary
        tl.store(out + start + within, g.to(out.dtype.element_ty), mask=inside, cache_modifier=".cs")


@triton.jit
def fill(out, first, end, value, TILE: tl.constexpr):
    for start in range(first, end, TILE):
        columns = start + tl.arange(0, TILE)
        filled = tl.zeros([TILE], tl.float32) + value
        tl.store(out + columns, filled.to(out.dtype.element_ty), mask=columns < end)


@triton.jit
def backward(
    student,
    teacher,
    targets,
    stats,
    coef_soft,
    coef_hard,
    out,
    student_layout,
    teacher_layout,
    out_layout,
    targets_stride,
    soft_stride,
    hard_stride,
    vocabulary,
    width,
    sections,
    k,
    k_t,
    unit,
    smoothing,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTHED: tl.constexpr,
    EXACT: tl.constexpr,
    ROOT: tl.constexpr,
    POWER: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    SECTION: tl.constexpr,
):
    """The gradient of one section of one row. `out` has `width` columns: 0 in those that the teacher lacks."""
    row = tl.program_id(0) // sections
    section = tl.program_id(0) % sections
    target = tl.load(targets + row.to(tl.int64) * targets_stride)
    out += row_start(row, out_layout)
    TILE: tl.constexpr = GROUPS * LANES * VECTOR
    if readable(target, vocabulary):
        at = stats + row.to(tl.int64) * STATS
        values = (
            tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5),
            tl.load(at + 6),
        )  # fmt: skip
        scales = gradient_scales(
            values, target, tl.load(coef_soft + row.to(tl.int64) * soft_stride),
            tl.load(coef_hard + row.to(tl.int64) * hard_stride), vocabulary, k, k_t, unit, smoothing,
            SOFT, HARD, SMOOTHED, EXACT, ROOT, POWER,
        )  # fmt: skip
        section_gradient(
            student + row_start(row, student_layout), teacher + row_start(row, teacher_layout), out, section,
            label_of(target, HARD), vocabulary, scales, k, k_t, SOFT, HARD, SMOOTHED, EXACT, ROOT, POWER,
            GROUPS, LANES, VECTOR, SECTION,
        )  # fmt: skip
    else:
        fill(out, section * SECTION, tl.minimum((section + 1) * SECTION, vocabulary), unread_value(target), TILE)
    if section == sections - 1:
        fill(out, vocabulary, width, 0.0, TILE)


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
    student_layout,
    teacher_layout,
    out_layout,
    targets_stride,
    soft_stride,
    hard_stride,
    vocabulary,
    width,
    sections,
    k,
    k_t,
    unit,
    smoothing,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    EXACT: tl.constexpr,
    ROOT: tl.constexpr,
    POWER: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    SECTION: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A row's terms and its gradient in one visit: the sections read last, and still in the cache, come first again."""
    row = tl.program_id(0)
    target = tl.load(targets + row.to(tl.int64) * targets_stride)
    out += row_start(row, out_layout)
    TILE: tl.constexpr = GROUPS * LANES * VECTOR
    if readable(target, vocabulary):
        student += row_start(row, student_layout)
        teacher += row_start(row, teacher_layout)
        label = label_of(target, HARD)
        if WHOLE:
            part = section_part(
                student, teacher, 0, label, vocabulary, k, k_t, SOFT, HARD, ENTROPY, SMOOTHED,
                EXACT, ROOT, POWER, GROUPS, LANES, VECTOR, SECTION, True,
            )  # fmt: skip
        else:
            part = nothing(smoothing)
            for section in range(sections):
                next_part = section_part(
                    student, teacher, section, label, vocabulary, k, k_t, SOFT, HARD, ENTROPY, SMOOTHED,
                    EXACT, ROOT, POWER, GROUPS, LANES, VECTOR, SECTION, True,
                )  # fmt: skip
                part = joined(part, next_part, k, k_t, SOFT, EXACT, ROOT, POWER)
        values = finish_row(
            part, student, row, target, vocabulary, k, k_t, smoothing, soft, hard,
            SOFT, HARD, ENTROPY, SMOOTHED, EXACT, ROOT, POWER,
        )  # fmt: skip
        scales = gradient_scales(
            values, target, tl.load(coef_soft + row.to(tl.int64) * soft_stride),
            tl.load(coef_hard + row.to(tl.int64) * hard_stride), vocabulary, k, k_t, unit, smoothing,
            SOFT, HARD, SMOOTHED, EXACT, ROOT, POWER,
        )  # fmt: skip
        for i in range(sections):
            section_gradient(
                student, teacher, out, sections - 1 - i, label, vocabulary, scales, k, k_t,
                SOFT, HARD, SMOOTHED, EXACT, ROOT, POWER, GROUPS, LANES, VECTOR, SECTION,
            )  # fmt: skip
    else:
        finish_unread_row(row, target, soft, hard)
        fill(out, 0, vocabulary, unread_value(target), TILE)
    fill(out, vocabulary, width, 0.0, TILE)
