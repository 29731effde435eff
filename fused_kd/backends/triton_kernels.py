"""The device code of the Triton backend: NVIDIA and AMD from one source. `triton.py` launches it.

The sums are those of csrc/row_math.h, with three differences that a GPU asks for.

Lanes. A tile of a row is viewed as [LANES, GROUPS * VECTOR]: every thread is a lane, loads VECTOR adjacent elements,
GROUPS times, and keeps a part of its own. Nothing crosses lanes until a section of the row has been read.

Powers of 2. Exponentials are measured from `reference(max)`, a whole number on the log2 scale, and not from the
maximum: then x * scale - reference is exact up to its one rounding in an FMA, and so is moving a sum to another one.

The log2 scale. delta, its shift and B1 are on it too:

    e_s = 2^(s k - R_s)      e_t = 2^(t k - R_t)      k = log2(e) / tau
    delta = (s - t) k - shift                 shift = (max_s - max_t) k
    e_s 2^(R_s - R_t - shift) = e_t 2^delta
    B1 = sum e_t delta       B2 = sum e_t phi(delta),   phi(delta) = 2^delta - 1 - delta ln 2 >= 0

Where |delta| is small phi is a polynomial. Elsewhere e_t phi = e_s 2^(R_s - R_t - shift) - e_t (1 + delta ln 2), and
the first of the two is summed by itself, as `far`, from the student's reference: so it stays whole where the teacher
has -inf and a reference of its own would be none.
"""

import triton
import triton.language as tl

from fused_kd.backends import rows

SKIP = tl.constexpr(rows.SKIP)
NO_LABEL = tl.constexpr(rows.NO_LABEL)
STATS = tl.constexpr(rows.STATS)
STUDENT_MAX = tl.constexpr(rows.STUDENT_MAX)
TEACHER_MAX = tl.constexpr(rows.TEACHER_MAX)
STUDENT_SUM = tl.constexpr(rows.STUDENT_SUM)
TEACHER_SUM = tl.constexpr(rows.TEACHER_SUM)
LOG_RATIO = tl.constexpr(rows.LOG_RATIO)
HARD_SUM = tl.constexpr(rows.HARD_SUM)
MISS = tl.constexpr(rows.MISS)

PARTS = tl.constexpr(10)  # the numbers of a part, and the columns of the buffer in which a row's sections meet

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The maximum of nothing: far below every logit, and finite on every scale. A row with nothing above it counts as -inf.
LOWEST = tl.constexpr(-1e30)
# 1.5 * 2^23: adding it rounds to a whole number.
ROUND = tl.constexpr(12582912.0)
# Below this |delta|, on the log2 scale, 2^delta - 1 is a polynomial; above it, a difference of exponentials.
SMALL = tl.constexpr(0.25)
# An exponent of 2 that leaves room for sums and products in float32.
FAR = tl.constexpr(100.0)


@triton.jit
def reference(maximum, scale):
    return tl.fma(maximum, scale, ROUND) - ROUND


@triton.jit
def power(u, EXPONENT: tl.constexpr):
    """u^1 to u^4."""
    result = u
    if EXPONENT >= 2:
        result = u * u
    if EXPONENT == 3:
        result *= u
    if EXPONENT == 4:
        result *= result
    return result


@triton.jit
def student_exponentials(s, max_s, k, ROOT: tl.constexpr, POWER: tl.constexpr):
    """exp(s / tau) and exp(s): powers of one exponential where tau = POWER / ROOT; POWER = 0 where they are not."""
    u = tl.exp2(tl.fma(s, k / ROOT, -reference(max_s, k / ROOT)))
    e_s = power(u, ROOT)
    e_1 = power(u, POWER) if POWER else tl.exp2(hard_exponent(s, max_s, k, ROOT, POWER))
    return e_s, e_1


@triton.jit
def hard_exponent(s, max_s, k, ROOT: tl.constexpr, POWER: tl.constexpr):
    """log2 of exp(s), from where `student_exponentials` measure it."""
    if POWER:
        exponent = POWER * tl.fma(s, k / ROOT, -reference(max_s, k / ROOT))
    else:
        exponent = tl.fma(s, LOG2E, -reference(max_s, LOG2E))
    return exponent


@triton.jit
def teacher_exponent(t, max_t, k):
    return tl.fma(t, k, -reference(max_t, k))


@triton.jit
def phi_over_square(d):
    """(2^d - 1 - d ln 2) / d^2 for |d| < SMALL, to 3e-7."""
    return 0.24022643 + d * (0.055504131 + d * (0.0096277579 + d * 0.0013336735))


@triton.jit
def phi(d):
    """2^d - 1 - d ln 2, for one number a lane: here an exponential more does not matter."""
    return tl.where(tl.abs(d) < SMALL, d * d * phi_over_square(d), tl.exp2(tl.minimum(d, FAR)) - 1 - d * LN2)


@triton.jit
def shift_of(max_s, max_t, k):
    """What delta is measured from. Near what most of p has: KL is exact in B2 where delta is small."""
    return (max_s - max_t) * k


@triton.jit
def log1p_less(x):
    """log(1 + x) - x for |x| <= 1/2, without cancellation: log(1 + x) = 2 atanh(z) and 2 z - x = -x z."""
    z = x / (2 + x)
    y = z * z
    series = 0.33333333 + y * (0.2 + y * (0.14285714 + y * (0.11111111 + y * (0.090909091 + y * 0.076923077))))
    return 2 * z * y * series - x * z


# A part: what has been read of a row by one lane, by one program or by all. Scalars, or one number a lane.
#
#   max_s, max_t           what the rest is measured from
#   z_s, z_t, b1, b2, far  the soft term
#   h                      sum of e_t log2(e_t), for the teacher's entropy
#   z_1                    sum of exp(s) over the columns other than the label
#   total                  sum of s, for label smoothing


@triton.jit
def nothing(LANES: tl.constexpr):
    zero = tl.zeros([LANES], tl.float32)
    return (zero + LOWEST, zero + LOWEST, zero, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def moved(part, max_s, max_t, k, SOFT: tl.constexpr, ROOT: tl.constexpr, POWER: tl.constexpr):
    """The part, measured from maxima at least as large as its own."""
    own_max_s, own_max_t, z_s, z_t, b1, b2, far, h, z_1, total = part
    down_root = reference(own_max_s, k / ROOT) - reference(max_s, k / ROOT)
    down_1 = POWER * down_root if POWER else reference(own_max_s, LOG2E) - reference(max_s, LOG2E)
    z_1 *= tl.exp2(down_1)
    if SOFT:
        down_t = reference(own_max_t, k) - reference(max_t, k)
        by_s = tl.exp2(ROOT * down_root)
        by_t = tl.exp2(down_t)
        z_s *= by_s
        far *= by_s
        # delta grows by d; so do phi and what it is a sum of.
        d = shift_of(own_max_s, own_max_t, k) - shift_of(max_s, max_t, k)
        bend = phi(d)
        growth = tl.fma(d, LN2, bend)  # 2^d - 1
        b2 = by_t * (b2 + growth * (b2 + LN2 * b1) + bend * z_t)
        b1 = tl.where(by_t > 0, by_t * tl.fma(d, z_t, b1), 0.0)  # b1 may be -inf
        h = by_t * tl.fma(down_t, z_t, h)
        z_t *= by_t
    return (max_s, max_t, z_s, z_t, b1, b2, far, h, z_1, total)


@triton.jit
def extended(
    part,
    s,
    t,
    columns,
    vocabulary,
    label,
    k,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    ROOT: tl.constexpr,
    POWER: tl.constexpr,
    EDGE: tl.constexpr,
):
    """The lanes' parts with one more tile. An EDGE tile may hold the label, and -inf where it reaches past the row."""
    max_s = tl.maximum(part[0], tl.max(s, 1))
    max_t = tl.maximum(part[1], tl.max(t, 1)) if SOFT else part[1]
    _, _, z_s, z_t, b1, b2, far, h, z_1, total = moved(part, max_s, max_t, k, SOFT, ROOT, POWER)
    e_s, e_1 = student_exponentials(s, max_s[:, None], k, ROOT, POWER)
    if SOFT:
        x_t = teacher_exponent(t, max_t[:, None], k)
        e_t = tl.exp2(x_t)
        # s - t first: it is exact where the two are close, and that is where delta has to be.
        delta = tl.fma(s - t, k, -shift_of(max_s, max_t, k)[:, None])
        small = tl.abs(delta) < SMALL
        first = tl.where(e_t > 0, e_t * delta, 0.0)  # 0 log 0 = 0; -inf student: -inf
        z_s += tl.sum(e_s, 1)
        z_t += tl.sum(e_t, 1)
        b1 += tl.sum(first, 1)
        b2 += tl.sum(tl.where(small, first * (delta * phi_over_square(delta)), -tl.fma(first, LN2, e_t)), 1)
        far += tl.sum(tl.where(small, 0.0, e_s), 1)
        if ENTROPY:
            h += tl.sum(tl.where(e_t > 0, e_t * x_t, 0.0), 1)
    if HARD:
        z_1 += tl.sum(tl.where(columns == label, 0.0, e_1) if EDGE else e_1, 1)
        if SMOOTHED:
            total += tl.sum(tl.where(columns < vocabulary, s, 0.0) if EDGE else s, 1)
    return (max_s, max_t, z_s, z_t, b1, b2, far, h, z_1, total)


@triton.jit
def merged(part, k, SOFT: tl.constexpr, ROOT: tl.constexpr, POWER: tl.constexpr):
    """One part of many."""
    max_s, max_t = tl.max(part[0], 0), tl.max(part[1], 0)
    _, _, z_s, z_t, b1, b2, far, h, z_1, total = moved(part, max_s, max_t, k, SOFT, ROOT, POWER)
    if SOFT:
        z_s, z_t, h = tl.sum(z_s, 0), tl.sum(z_t, 0), tl.sum(h, 0)
        b1, b2, far = tl.sum(b1, 0), tl.sum(b2, 0), tl.sum(far, 0)
    else:
        z_s, z_t, h, b1, b2, far = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    return (max_s, max_t, z_s, z_t, b1, b2, far, h, tl.sum(z_1, 0), tl.sum(total, 0))


@triton.jit
def finished_soft(part, k, ENTROPY: tl.constexpr, ROOT: tl.constexpr, POWER: tl.constexpr):
    """The soft term; and what stats have of it: both sums, measured from the maxima, and the log of their ratio."""
    max_s, max_t, z_s, z_t, b1, b2, far, h, _, _ = part
    shift = shift_of(max_s, max_t, k)
    apart = ROOT * reference(max_s, k / ROOT) - reference(max_t, k) - shift
    b1 *= LN2
    b2 += far * tl.exp2(tl.minimum(apart, FAR))
    x = (b1 + b2) / z_t
    second = b2 / z_t
    less = log1p_less(x)
    near = tl.abs(x) < 0.5

    student_sum = z_s / student_exponentials(max_s, max_s, k, ROOT, POWER)[0]
    teacher_sum = z_t / tl.exp2(teacher_exponent(max_t, max_t, k))
    # delta is measured from the shift as it is rounded, the sums from the maxima.
    gap = tl.fma(max_s - max_t, k, -shift) * LN2
    log_ratio = tl.where(near, x + less - gap, tl.log2(student_sum / teacher_sum) * LN2)

    # Close to the teacher, B2 carries the value; far from it, B2 is large and B1 does.
    soft = tl.where(near & (second < 0.5), less + second, log_ratio + gap - b1 / z_t)
    soft = tl.where(soft < 0, 0.0, soft)
    if ENTROPY:
        soft += (tl.log2(z_t) - h / z_t) * LN2
    whole = (z_s != 0) & (z_t != 0)  # else a row of -inf
    return tl.where(whole, soft, float("nan")), student_sum, teacher_sum, log_ratio


@triton.jit
def finished_hard(
    part, logit, vocabulary, smoothing, k, SMOOTHED: tl.constexpr, ROOT: tl.constexpr, POWER: tl.constexpr
):
    """-log softmax(s)[label] and 1 - softmax(s)[label], from the other columns' sum, so that a sure and right student
    keeps its digits; and the sum over all columns, measured from the maximum."""
    max_s, z_1, total = part[0], part[8], part[9]
    exponent = hard_exponent(logit, max_s, k, ROOT, POWER)
    own = tl.exp2(exponent)
    ratio = z_1 / own
    hard_sum = z_1 + own
    hard = tl.where(ratio < 0.5, ratio + log1p_less(ratio), (tl.log2(hard_sum) - exponent) * LN2)
    if SMOOTHED:
        hard += smoothing * (logit - total / vocabulary)
    at_max = tl.exp2(hard_exponent(max_s, max_s, k, ROOT, POWER))
    return tl.where(hard_sum != 0, hard, float("nan")), hard_sum / at_max, z_1 / hard_sum


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
def loaded(row, start, within, end, EDGE: tl.constexpr):
    """Logits in float32, -inf from `end` on. Read once: not kept in the cache."""
    at = row + start + within
    if EDGE:
        x = tl.load(at, mask=start + within < end, other=-float("inf"), eviction_policy="evict_first")
    else:
        x = tl.load(at, eviction_policy="evict_first")
    return x.to(tl.float32)


@triton.jit
def tile_of(row, start, end, GROUPS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EDGE: tl.constexpr):
    GROUP: tl.constexpr = LANES * VECTOR
    within = group_columns(LANES, VECTOR)
    x = loaded(row, start, within, end, EDGE)
    if GROUPS > 1:
        x = beside(x, loaded(row, start + GROUP, within, end, EDGE))
    if GROUPS > 2:
        y = loaded(row, start + 2 * GROUP, within, end, EDGE)
        x = beside(x, beside(y, loaded(row, start + 3 * GROUP, within, end, EDGE)))
    return x


@triton.jit
def tempered(t, factor, TEMPERED: tl.constexpr):
    """The teacher's own temperature is a factor on its logits, so that elsewhere there is one temperature."""
    return t * factor if TEMPERED else t


@triton.jit
def finish_row(
    part,
    student,
    row,
    target,
    vocabulary,
    k,
    smoothing,
    soft,
    hard,
    stats,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    ROOT: tl.constexpr,
    POWER: tl.constexpr,
):
    """Writes all that the forward says of a row."""
    stats += row.to(tl.int64) * STATS
    tl.store(stats + STUDENT_MAX, part[0])
    soft_value = 0.0
    if SOFT:
        soft_value, student_sum, teacher_sum, log_ratio = finished_soft(part, k, ENTROPY, ROOT, POWER)
        tl.store(stats + TEACHER_MAX, part[1])
        tl.store(stats + STUDENT_SUM, student_sum)
        tl.store(stats + TEACHER_SUM, teacher_sum)
        tl.store(stats + LOG_RATIO, log_ratio)
    tl.store(soft + row, soft_value)
    hard_value = 0.0
    if HARD:
        if target >= 0:
            logit = tl.load(student + target).to(tl.float32)
            hard_value, hard_sum, miss = finished_hard(part, logit, vocabulary, smoothing, k, SMOOTHED, ROOT, POWER)
            tl.store(stats + HARD_SUM, hard_sum)
            tl.store(stats + MISS, miss)
    tl.store(hard + row, hard_value)


@triton.jit
def finish_unread_row(row, target, soft, hard):
    value = unread_value(target)
    tl.store(soft + row, value)
    tl.store(hard + row, value)


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
    teacher_factor,
    smoothing,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    TEMPERED: tl.constexpr,
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
        label = label_of(target, HARD)
        TILE: tl.constexpr = GROUPS * LANES * VECTOR
        first, plain, labelled, edges, last = section_tiles(section, vocabulary, label, SECTION, TILE)
        within = tile_columns(GROUPS, LANES, VECTOR)
        part = nothing(LANES)
        for i in range(plain):
            start = first + (i + (i >= labelled).to(tl.int32)) * TILE
            s = tile_of(student, start, vocabulary, GROUPS, LANES, VECTOR, False)
            t = s
            if SOFT:
                t = tile_of(teacher, start, vocabulary, GROUPS, LANES, VECTOR, False)
                t = tempered(t, teacher_factor, TEMPERED)
            part = extended(
                part,
                s,
                t,
                start + within,
                vocabulary,
                label,
                k,
                SOFT,
                HARD,
                ENTROPY,
                SMOOTHED,
                ROOT,
                POWER,
                False,
            )
        for i in range(edges):
            start = first + tl.where(i == 0, labelled, last) * TILE
            s = tile_of(student, start, vocabulary, GROUPS, LANES, VECTOR, True)
            t = s
            if SOFT:
                t = tile_of(teacher, start, vocabulary, GROUPS, LANES, VECTOR, True)
                t = tempered(t, teacher_factor, TEMPERED)
            part = extended(
                part,
                s,
                t,
                start + within,
                vocabulary,
                label,
                k,
                SOFT,
                HARD,
                ENTROPY,
                SMOOTHED,
                ROOT,
                POWER,
                True,
            )
        part = merged(part, k, SOFT, ROOT, POWER)
        if WHOLE:
            finish_row(
                part, student, row, target, vocabulary, k, smoothing, soft, hard, stats,
                SOFT, HARD, ENTROPY, SMOOTHED, ROOT, POWER,
            )  # fmt: skip
        else:
            parts += tl.program_id(0).to(tl.int64) * PARTS
            for i in tl.static_range(PARTS):
                tl.store(parts + i, part[i])
    elif WHOLE:
        finish_unread_row(row, target, soft, hard)


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
    smoothing,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    ROOT: tl.constexpr,
    POWER: tl.constexpr,
    SECTIONS: tl.constexpr,
):
    """Puts the sections of a row together. SECTIONS: a power of 2 that is not less than `sections`."""
    row = tl.program_id(0)
    target = tl.load(targets + row.to(tl.int64) * targets_stride)
    if readable(target, vocabulary):
        section = tl.arange(0, SECTIONS)
        here = section < sections
        parts += row.to(tl.int64) * sections * PARTS
        at = parts + section * PARTS
        part = (
            tl.load(at, mask=here, other=LOWEST),
            tl.load(at + 1, mask=here, other=LOWEST),
            tl.load(at + 2, mask=here, other=0.0),
            tl.load(at + 3, mask=here, other=0.0),
            tl.load(at + 4, mask=here, other=0.0),
            tl.load(at + 5, mask=here, other=0.0),
            tl.load(at + 6, mask=here, other=0.0),
            tl.load(at + 7, mask=here, other=0.0),
            tl.load(at + 8, mask=here, other=0.0),
            tl.load(at + 9, mask=here, other=0.0),
        )
        finish_row(
            merged(part, k, SOFT, ROOT, POWER), student + row_start(row, student_layout),
            row, target, vocabulary, k, smoothing, soft, hard, stats, SOFT, HARD, ENTROPY, SMOOTHED, ROOT, POWER,
        )  # fmt: skip
    else:
        finish_unread_row(row, target, soft, hard)


@triton.jit
def gradient_scales(
    row,
    target,
    stats,
    grad_soft,
    grad_hard,
    vocabulary,
    k,
    unit,
    smoothing,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTHED: tl.constexpr,
    ROOT: tl.constexpr,
    POWER: tl.constexpr,
):
    """Of gradient = by_s e_s - by_t e_t + by_1 e_1 + constant; at the label, at_label in the place of by_1 e_1."""
    stats += row.to(tl.int64) * STATS
    max_s = tl.load(stats + STUDENT_MAX)
    at_max_s, at_max_1 = student_exponentials(max_s, max_s, k, ROOT, POWER)
    max_t, by_s, by_t, log_ratio, rest = 0.0, 0.0, 0.0, 0.0, 0.0
    if SOFT:
        max_t = tl.load(stats + TEACHER_MAX)
        scale = tl.load(grad_soft) * unit
        by_s = scale / (tl.load(stats + STUDENT_SUM) * at_max_s)
        by_t = scale / (tl.load(stats + TEACHER_SUM) * tl.exp2(teacher_exponent(max_t, max_t, k)))
        # log2(q / p) is (s - t) k less a number that float32 cannot hold well enough: log_ratio, and a rest.
        own = tl.load(stats + LOG_RATIO) * LOG2E
        log_ratio = tl.fma(max_s - max_t, k, own)
        rest = -LN2 * (tl.fma(max_s - max_t, k, -log_ratio) + own)
    by_1, constant, at_label = 0.0, 0.0, 0.0
    if HARD:
        if target >= 0:
            scale_1 = tl.load(grad_hard)
            by_1 = scale_1 / (tl.load(stats + HARD_SUM) * at_max_1)
            # softmax(s)[label] - 1 would lose what a sure student has left to learn.
            at_label = -scale_1 * tl.load(stats + MISS)
            if SMOOTHED:
                at_label += scale_1 * smoothing
                constant = -scale_1 * smoothing / vocabulary
    return max_s, max_t, by_s, by_t, log_ratio, rest, by_1, constant, at_label


@triton.jit
def gradient(
    s,
    t,
    columns,
    label,
    scales,
    k,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTHED: tl.constexpr,
    ROOT: tl.constexpr,
    POWER: tl.constexpr,
    EDGE: tl.constexpr,
):
    max_s, max_t, by_s, by_t, log_ratio, rest, by_1, constant, at_label = scales
    e_s, e_1 = student_exponentials(s, max_s, k, ROOT, POWER)
    g = tl.zeros_like(s)
    if SOFT:
        p = by_t * tl.exp2(teacher_exponent(t, max_t, k))
        # log2(q / p), but for the rest; where it is small the difference of the two has lost its digits.
        d = tl.fma(s - t, k, -log_ratio)
        near = p * (rest + d * (LN2 + d * phi_over_square(d)))
        g = tl.where(tl.abs(d) < SMALL, near, by_s * e_s - p)
    if HARD:
        g += tl.where(columns == label, at_label, by_1 * e_1) if EDGE else by_1 * e_1
        if SMOOTHED:
            g += constant
    return g


@triton.jit
def backward(
    student,
    teacher,
    targets,
    stats,
    grad_soft,
    grad_hard,
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
    teacher_factor,
    unit,
    smoothing,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTHED: tl.constexpr,
    TEMPERED: tl.constexpr,
    ROOT: tl.constexpr,
    POWER: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    SECTION: tl.constexpr,
):
    """The gradient of one section of one row; `out` has `width` columns and may be the student's logits themselves."""
    row = tl.program_id(0) // sections
    section = tl.program_id(0) % sections
    target = tl.load(targets + row.to(tl.int64) * targets_stride)
    out += row_start(row, out_layout)
    TILE: tl.constexpr = GROUPS * LANES * VECTOR
    label = label_of(target, HARD)
    first, plain, labelled, edges, last = section_tiles(section, vocabulary, label, SECTION, TILE)
    # VECTOR wide, so that logits of both dtypes lie in the threads alike.
    within = group_columns(GROUPS * LANES, VECTOR)
    if readable(target, vocabulary):
        student += row_start(row, student_layout)
        teacher += row_start(row, teacher_layout)
        grad_soft += row.to(tl.int64) * soft_stride
        grad_hard += row.to(tl.int64) * hard_stride
        scales = gradient_scales(
            row, target, stats, grad_soft, grad_hard, vocabulary, k, unit, smoothing, SOFT, HARD, SMOOTHED, ROOT, POWER
        )
        for i in range(plain):
            start = first + (i + (i >= labelled).to(tl.int32)) * TILE
            s = loaded(student, start, within, vocabulary, False)
            t = s
            if SOFT:
                t = tempered(loaded(teacher, start, within, vocabulary, False), teacher_factor, TEMPERED)
            g = gradient(s, t, start + within, label, scales, k, SOFT, HARD, SMOOTHED, ROOT, POWER, False)
            tl.store(out + start + within, g.to(out.dtype.element_ty), cache_modifier=".cs")
        for i in range(edges):
            start = first + tl.where(i == 0, labelled, last) * TILE
            s = loaded(student, start, within, vocabulary, True)
            t = s
            if SOFT:
                t = tempered(loaded(teacher, start, within, vocabulary, True), teacher_factor, TEMPERED)
            g = gradient(s, t, start + within, label, scales, k, SOFT, HARD, SMOOTHED, ROOT, POWER, True)
            inside = start + within < vocabulary
            tl.store(out + start + within, g.to(out.dtype.element_ty), mask=inside, cache_modifier=".cs")
    else:
        value = unread_value(target)
        for start in range(first, tl.minimum(first + SECTION, vocabulary), TILE):
            columns = start + within
            filled = tl.full(columns.shape, 0.0, tl.float32) + value
            tl.store(out + columns, filled.to(out.dtype.element_ty), mask=columns < vocabulary)
    # The student's columns that the teacher lacks.
    if section == sections - 1:
        for start in range(vocabulary, width, TILE):
            columns = start + within
            tl.store(out + columns, tl.zeros(columns.shape, out.dtype.element_ty), mask=columns < width)
