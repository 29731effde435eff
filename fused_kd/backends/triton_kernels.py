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


@triton.jit
def label_of(target, HARD: tl.constexpr):
    """The column of the label, or -1: no column."""
    return tl.where(target >= 0, target, -1).to(tl.int32) if HARD else -1


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
def section_part(
    student,
    teacher,
    section,
    sections,
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
    SHIFTED: tl.constexpr,
    ALIKE: tl.constexpr,
    KEPT: tl.constexpr,
):
    """What one section of a row comes to."""
    TILE: tl.constexpr = GROUPS * LANES * VECTOR
    STUDENT: tl.constexpr = student.dtype.element_ty
    TEACHER: tl.constexpr = teacher.dtype.element_ty
    first = section * SECTION
    last = section == sections - 1
    head, plain, labelled, edges, whole = section_tiles(first, 0, vocabulary, last, label, SECTION, TILE)
    within = tile_columns(0, GROUPS, LANES, VECTOR)
    part = nothing(tl.zeros([LANES], tl.float32))
    own = centre(part[0], part[1], k, k_t, EXACT, ROOT)
    # Where rows lie alike, there is a loop for each half of 16 bytes that they may begin in, and all but one are empty:
    # a choice between registers would cost an instruction a pair.
    HALVES: tl.constexpr = SHIFTED and ALIKE and STUDENT == TEACHER
    for HALF in tl.static_range(0 if HALVES else UNKNOWN, UNKNOWN if HALVES else UNKNOWN + 1):
        students = reader(student, LANES, VECTOR, SHIFTED, HALF)
        teachers = reader(teacher, LANES, VECTOR, SHIFTED, HALF)
        here = tl.where(half_of(student) == HALF, plain, 0) if HALVES else plain
        for i in range(first, first + here, TILE):
            start = tl.where(i == first + labelled, first + plain, i)
            s = tile_of(students, start, vocabulary, STUDENT, GROUPS, VECTOR, SHIFTED, False, KEPT)
            t = tile_of(teachers, start, vocabulary, TEACHER, GROUPS, VECTOR, SHIFTED, False, KEPT) if SOFT else s
            part, own = extended(
                part, own, s, t, start + within, vocabulary, label, k, k_t,
                SOFT, HARD, ENTROPY, SMOOTHED, EXACT, ROOT, POWER, False,
            )  # fmt: skip
    students = reader(student, LANES, VECTOR, SHIFTED, UNKNOWN)
    teachers = reader(teacher, LANES, VECTOR, SHIFTED, UNKNOWN)
    for i in range(edges):
        start = first + edge_tile(i, head, labelled, whole)
        s = tile_of(students, start, vocabulary, STUDENT, GROUPS, VECTOR, SHIFTED, True, KEPT)
        t = tile_of(teachers, start, vocabulary, TEACHER, GROUPS, VECTOR, SHIFTED, True, KEPT) if SOFT else s
        part, own = extended(
            part, own, s, t, start + within, vocabulary, label, k, k_t,
            SOFT, HARD, ENTROPY, SMOOTHED, EXACT, ROOT, POWER, True,
        )  # fmt: skip
    return merged(part, own, k, k_t, SOFT, ENTROPY, EXACT, ROOT, POWER)


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
    return part[0], part[1], student_sum, teacher_sum, log_ratio, hard_sum, miss, zero, zero


@triton.jit
def finish_unread_row(row, target, soft, hard):
    """The same for a row without a term."""
    value = unread_value(target)
    tl.store(soft + row, value)
    tl.store(hard + row, value)
    return value, value, value, value, value, value, value, value, value


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
    SHIFTED: tl.constexpr,
    ALIKE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One section of one row. WHOLE: it is the whole row; else `finish` puts the row's sections together."""
    row = tl.program_id(0) // sections
    section = tl.program_id(0) % sections
    target = tl.load(targets + row.to(tl.int64) * targets_stride)
    if readable(target, vocabulary):
        student += row_start(row, student_layout)
        teacher += row_start(row, teacher_layout)
        label = label_of(target, HARD)
        part = section_part(
            student, teacher, section, sections, label, vocabulary, k, k_t, SOFT, HARD, ENTROPY, SMOOTHED,
            EXACT, ROOT, POWER, GROUPS, LANES, VECTOR, SECTION, SHIFTED, ALIKE, False,
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
                tl.load(at + 5), tl.load(at + 6), tl.load(at + 7), tl.load(at + 8), tl.load(at + 9),
                tl.load(at + 10),
            )  # fmt: skip
            part = joined(part, next_part, k, k_t, SOFT, ENTROPY, EXACT, ROOT, POWER)
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
    sections,
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
    ALIKE: tl.constexpr,
):
    """Writes the gradient of one section of a row; `out` may be the student's logits themselves.

    Columns are counted from a multiple of a vector's bytes of `out`, at or before its first. ALIKE: which is one of the
    logits' too.
    """
    TILE: tl.constexpr = GROUPS * LANES * VECTOR
    STUDENT: tl.constexpr = student.dtype.element_ty
    TEACHER: tl.constexpr = teacher.dtype.element_ty
    FINE: tl.constexpr = STUDENT == tl.float32
    aligned = floored(out, VECTOR * (STUDENT.primitive_bitwidth // 8))
    begin = columns_between(aligned, out)
    end = begin + vocabulary
    label = tl.where(label >= 0, begin + label, -1)
    first = section * SECTION
    last = section == sections - 1
    head, plain, labelled, edges, whole = section_tiles(first, begin, end, last, label, SECTION, TILE)
    # VECTOR wide, so that logits of both dtypes lie in the threads alike. From the first tile, so that the loop has
    # one number to add.
    student_at, teacher_at, out_at = student - begin + first, teacher - begin + first, aligned + first
    students = reader(student_at, GROUPS * LANES, VECTOR, not ALIKE, UNKNOWN)
    teachers = reader(teacher_at, GROUPS * LANES, VECTOR, not ALIKE, UNKNOWN)
    within = tile_columns(first, 1, GROUPS * LANES, VECTOR)
    out_tile = reader(out_at, GROUPS * LANES, VECTOR, False, UNKNOWN)[0][:, None] + tl.arange(0, VECTOR)[None, :]
    begin -= first
    end -= first
    for i in range(head, plain, TILE):
        start = tl.where(i == labelled, plain, i)
        s = loaded(students, start, begin, end, STUDENT, VECTOR, not ALIKE, False, False)
        t = loaded(teachers, start, begin, end, TEACHER, VECTOR, not ALIKE, False, False) if SOFT else s
        g = gradient(s, t, start + within, label, scales, k, k_t, SOFT, HARD, SMOOTHED, EXACT, ROOT, POWER, FINE, False)
        tl.store(out_tile + start, g.to(STUDENT), cache_modifier=".cs")
    for i in range(edges):  # their whole vectors
        start = edge_tile(i, head, labelled, whole)
        s = loaded(students, start, begin, end, STUDENT, VECTOR, not ALIKE, True, False)
        t = loaded(teachers, start, begin, end, TEACHER, VECTOR, not ALIKE, True, False) if SOFT else s
        g = gradient(s, t, start + within, label, scales, k, k_t, SOFT, HARD, SMOOTHED, EXACT, ROOT, POWER, FINE, True)
        vector = start + tl.arange(0, GROUPS * LANES) * VECTOR
        inside = (vector >= begin) & (vector + VECTOR <= end)
        tl.store(out_tile + start, g.to(STUDENT), mask=inside[:, None], cache_modifier=".cs")
    # The row's first and last columns, where they do not fill a vector. Those of the logits may lie at any address.
    ragged_end = last & (end % VECTOR > 0) & ((begin <= 0) | (end >= VECTOR))
    for i in range(tl.where(begin > 0, 0, 1), tl.where(ragged_end, 2, 1)):
        start = tl.where(i == 0, 0, end // VECTOR * VECTOR)
        one_student = reader(student_at + start, 1, VECTOR, not ALIKE, UNKNOWN)
        one_teacher = reader(teacher_at + start, 1, VECTOR, not ALIKE, UNKNOWN)
        columns = tile_columns(start, 1, 1, VECTOR)
        s = loaded(one_student, 0, begin - start, end - start, STUDENT, VECTOR, not ALIKE, True, False)
        t = loaded(one_teacher, 0, begin - start, end - start, TEACHER, VECTOR, not ALIKE, True, False) if SOFT else s
        g = gradient(s, t, first + columns, label, scales, k, k_t, SOFT, HARD, SMOOTHED, EXACT, ROOT, POWER, FINE, True)
        tl.store(out_at + columns, g.to(STUDENT), mask=(columns >= begin) & (columns < end))


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
    ALIKE: tl.constexpr,
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
            student + row_start(row, student_layout), teacher + row_start(row, teacher_layout), out, section, sections,
            label_of(target, HARD), vocabulary, scales, k, k_t, SOFT, HARD, SMOOTHED, EXACT, ROOT, POWER,
            GROUPS, LANES, VECTOR, SECTION, ALIKE,
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
    SHIFTED: tl.constexpr,
    ALIKE: tl.constexpr,
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
                student, teacher, 0, 1, label, vocabulary, k, k_t, SOFT, HARD, ENTROPY, SMOOTHED,
                EXACT, ROOT, POWER, GROUPS, LANES, VECTOR, SECTION, SHIFTED, ALIKE, True,
            )  # fmt: skip
        else:
            part = nothing(smoothing)
            for section in range(sections):
                next_part = section_part(
                    student, teacher, section, sections, label, vocabulary, k, k_t, SOFT, HARD, ENTROPY, SMOOTHED,
                    EXACT, ROOT, POWER, GROUPS, LANES, VECTOR, SECTION, SHIFTED, ALIKE, True,
                )  # fmt: skip
                part = joined(part, next_part, k, k_t, SOFT, ENTROPY, EXACT, ROOT, POWER)
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
                student, teacher, out, sections - 1 - i, sections, label, vocabulary, scales, k, k_t,
                SOFT, HARD, SMOOTHED, EXACT, ROOT, POWER, GROUPS, LANES, VECTOR, SECTION, ALIKE,
            )  # fmt: skip
    else:
        finish_unread_row(row, target, soft, hard)
        fill(out, 0, vocabulary, unread_value(target), TILE)
    fill(out, vocabulary, width, 0.0, TILE)
