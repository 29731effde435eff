"""The mathematics of a row for the Triton kernels: what csrc/row_math.h is to the native ones.

The sums are those of docs/design.md, with three differences that a GPU asks for.

Lanes. A tile of a row is viewed as [LANES, n]: every thread is a lane and keeps a part of its own, measured from its
own maxima. Nothing crosses lanes until a section of the row has been read.

The log2 scale. Exponentials are powers of 2, and delta is on that scale too:

    e_s = 2^(s k - S)     e_t = 2^(t k_t - T)     S, T: references of the points measured from     k = log2(e) / tau
    delta = (s k - S) - (t k_t - T) - lag,  so e_s 2^-lag = e_t 2^delta
    B1 = sum e_t delta    B2 = sum e_t phi(delta),   phi(delta) = 2^delta - 1 - delta ln 2 >= 0

EXACT, for float32 students: delta comes from s - t, which has no rounding where the two are close; references lie on
a grid, on which differences have none; and the lag is what the grid leaves over, so that delta is 0 at the points. (A
teacher that is sure of one token leaves nothing else to see.) Logits of 16 bits are never so close that the difference
of the exponents would not do: there the references are the points' own exponents, and the lag is 0.

Powers. At some temperatures exp(s / tau) = u^ROOT and exp(s) = u^POWER; POWER = 0 where they are not.

A part is what has been read of a row by one lane, by one program or by all; scalars, or one number a lane:

    point_s, point_t  what the rest is measured from: a lane's maxima
    z_s, z_t, b1, b2  the soft term; z_s is the sum of e_s 2^-lag
    h, rest           sums of e_t log2(e_t) and e_t over the columns that do not lie at point_t, for the teacher's
                      entropy: of a sure teacher it is what z_t has beside 1, and would lose
    z_1               sum of exp(s) over the columns other than the label
    total             sum of s, for label smoothing
    excess            EXACT: sum of e_s 2^-lag - e_t. It is B1 ln 2 + B2, but the two may be large and cancel
"""

import triton
import triton.language as tl

PARTS = tl.constexpr(11)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The maximum of nothing, finite on every scale. A counted row with no logit above it is one of -inf.
LOWEST = tl.constexpr(-1e28)
# 1.5 * 2^11: a float32 near it is a multiple of 2^-12.
ROUND = tl.constexpr(3072.0)
# 1.5 * 2^23 / 256.
GRID = tl.constexpr(49152.0)
# Below this |delta|, 2^delta - 1 is a polynomial; above it, a difference of exponentials.
SMALL = tl.constexpr(0.18)
# Below this |log(q / p)| the mean of p and q is their logarithmic mean to 3e-5, a tenth of what float16 rounds.
SMALL_16 = tl.constexpr(0.02)
# How far above its point, on the log2 scale, a logit may lie.
REACH = tl.constexpr(60.0)


@triton.jit
def reference(x, k, EXACT: tl.constexpr):
    return tl.fma(x, k, ROUND) - ROUND if EXACT else x * k


@triton.jit
def on_grid(x):
    """To 1/256, so that differences of logits that size are exact."""
    return (x + GRID) - GRID


@triton.jit
def between(point_s, point_t):
    """For `difference`: how far the points are apart, on a grid, and what is left of them without that."""
    apart = point_s - point_t
    apart = tl.where(tl.abs(apart) < 16384, on_grid(apart), apart)
    return apart, difference(point_s, point_t, apart, 0.0)


@triton.jit
def difference(s, t, apart, then):
    """(s - t) - (point_s - point_t) without rounding where the student is close: what lies between the points goes off
    the one of s and t farther from 0. That is exact, and leaves close numbers, whose difference is exact too."""
    positive = tl.maximum(apart, 0.0)
    off_s = tl.where(t > apart * -0.5, positive, apart - positive)  # where s = t + apart is farther, or nothing
    return ((s - off_s) - (t + (apart - off_s))) - then


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
def student_exponent(s, point_s, k, EXACT: tl.constexpr, ROOT: tl.constexpr):
    """log2 of the ROOT-th root of exp(s / tau)."""
    return tl.fma(s, k / ROOT, -reference(point_s, k / ROOT, EXACT))


@triton.jit
def student_exponentials(x_s, s, point_s, k, EXACT: tl.constexpr, ROOT: tl.constexpr, POWER: tl.constexpr):
    """exp(s / tau) and exp(s)."""
    u = tl.exp2(x_s)
    e_s = power(u, ROOT)
    e_1 = power(u, POWER) if POWER else tl.exp2(hard_exponent(s, point_s, k, EXACT, ROOT, POWER))
    return e_s, e_1


@triton.jit
def hard_exponent(s, point_s, k, EXACT: tl.constexpr, ROOT: tl.constexpr, POWER: tl.constexpr):
    """log2 of exp(s), from where `student_exponentials` measures it."""
    if POWER:
        exponent = POWER * student_exponent(s, point_s, k, EXACT, ROOT)
    else:
        exponent = tl.fma(s, LOG2E, -reference(point_s, LOG2E, EXACT))
    return exponent


@triton.jit
def teacher_exponent(t, point_t, k_t, EXACT: tl.constexpr):
    return tl.fma(t, k_t, -reference(point_t, k_t, EXACT))


@triton.jit
def log2_ratio(x_s, x_t, ROOT: tl.constexpr):
    """delta of columns that are not EXACT."""
    return tl.fma(x_s, ROOT, -x_t) if ROOT > 1 else x_s - x_t


@triton.jit
def phi_over_square(d, TERMS: tl.constexpr):
    """(2^d - 1 - d ln 2) / d^2 for |d| < SMALL: minimax, to 9e-6, 9e-8 with 3, 4 terms."""
    if TERMS == 3:
        value = tl.fma(d, tl.fma(d, 0.0096231212, 0.055536519), 0.24022649)
    else:
        value = tl.fma(d, tl.fma(d, tl.fma(d, 0.0013339737, 0.0096231212), 0.055504104), 0.24022649)
    return value


@triton.jit
def log1p_less(x):
    """log(1 + x) - x for |x| <= 1/2, without cancellation: log(1 + x) = 2 atanh(z) and 2 z - x = -x z."""
    z = x / (2 + x)
    y = z * z
    series = 0.33333333 + y * (0.2 + y * (0.14285714 + y * (0.11111111 + y * (0.090909091 + y * 0.076923077))))
    return 2 * z * y * series - x * z


@triton.jit
def nothing(like):
    """The part of a row of which nothing was read, in the shape of `like`."""
    zero = like * 0.0
    return (zero + LOWEST, zero + LOWEST, zero, zero, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def centre(point_s, point_t, k, k_t, EXACT: tl.constexpr, ROOT: tl.constexpr):
    """What goes with a part's points: the root of S, T, the lag, and how far they are apart as `between` has it."""
    root = reference(point_s, k / ROOT, EXACT)
    at_t = reference(point_t, k_t, EXACT)
    apart = point_s - point_t
    lag = root * 0.0
    if EXACT:
        lag = apart * k - (ROOT * root - at_t)
        lag = tl.where(tl.abs(lag) < 0.0625, lag, 0.0)  # no column is there, or one too large for a grid
    apart, then = between(point_s, point_t)
    return root, at_t, apart, lag, then


@triton.jit
def delta_between(own, to, k, EXACT: tl.constexpr, ROOT: tl.constexpr):
    """What delta grows by from one centre to another."""
    # (What lies on the grid has exact differences; point_s - point_t has none.)
    return ((own[2] - to[2]) + (own[4] - to[4])) * k if EXACT else ROOT * (own[0] - to[0]) - (own[1] - to[1])


@triton.jit
def unlagged(lag):
    """2^-lag."""
    x = lag * -LN2
    return tl.fma(x, tl.fma(x, 0.5, 1.0), 1.0)


@triton.jit
def moved(
    part, own, point_s, point_t, to, k, k_t, SOFT: tl.constexpr, ENTROPY: tl.constexpr, EXACT: tl.constexpr,
    ROOT: tl.constexpr, POWER: tl.constexpr, LAST: tl.constexpr = True,
):  # fmt: skip
    """The part, from its `own` centre to another: none so far below its own that an exponential overflows.

    Not LAST: of a lane, which is one of many and will be moved again.
    """
    own_s, own_t, z_s, z_t, b1, b2, h, z_1, total, excess, rest = part
    down_root = own[0] - to[0]
    down_1 = POWER * down_root if POWER else reference(own_s, LOG2E, EXACT) - reference(point_s, LOG2E, EXACT)
    z_1 *= tl.exp2(down_1)
    if SOFT:
        down_s = ROOT * down_root
        down_t = own[1] - to[1]
        d = delta_between(own, to, k, EXACT, ROOT)
        by_s = tl.exp2(down_s + (own[3] - to[3]) if EXACT else down_s)
        by_t = tl.exp2(down_t)
        bend = by_t * (d * d * phi_over_square(d, 3))
        near = tl.abs(d) < SMALL
        growth = tl.where(near, tl.fma(by_t * d, LN2, bend), by_s - by_t)  # by_t (2^d - 1)
        bend = tl.where(near, bend, tl.fma(by_t * d, -LN2, growth))  # by_t phi(d)
        far = b2 > z_s
        b2 = tl.fma(bend, z_t, tl.fma(growth, b1 * LN2, by_s * b2))
        if EXACT:
            excess = tl.fma(growth, z_t, by_s * excess)
        b1 = tl.where(by_t > 0, by_t * tl.fma(d, z_t, b1), 0.0)  # b1 may be -inf
        if ENTROPY:
            # What lay at its point, at the exponent that the reference leaves over, does no more.
            here = own_t == point_t
            left_over = tl.where(z_t > 0, teacher_exponent(own_t, own_t, k_t, EXACT), 0.0)
            h = tl.where(here, h, by_t * tl.fma(down_t, z_t, tl.fma(z_t - rest, left_over, h)))
            rest = tl.where(here, rest, by_t * z_t)
        z_s *= by_s
        z_t *= by_t
        if LAST:
            # Far from the teacher those terms cancel; what they leave is in z_s and z_t.
            b2 = tl.where(far, (z_s - z_t) - b1 * LN2, b2)
            excess = tl.where(far, z_s - z_t, excess)
    return z_s, z_t, b1, b2, h, z_1, total, excess, rest


@triton.jit
def extended(
    part,
    own,
    s,
    t,
    columns,
    vocabulary,
    label,
    k,
    k_t,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    EXACT: tl.constexpr,
    ROOT: tl.constexpr,
    POWER: tl.constexpr,
    EDGE: tl.constexpr,
):
    """The lanes' parts with one more tile, and their centres.

    An EDGE tile may hold the label, and -inf where it reaches past the row.
    """
    max_s = tl.maximum(part[0], tl.max(s, 1))
    max_t = tl.maximum(part[1], tl.max(t, 1)) if SOFT else part[1]
    to = centre(max_s, max_t, k, k_t, EXACT, ROOT)
    z_s, z_t, b1, b2, h, z_1, total, excess, rest = moved(
        part, own, max_s, max_t, to, k, k_t, SOFT, ENTROPY, EXACT, ROOT, POWER, False
    )
    x_s = student_exponent(s, max_s[:, None], k, EXACT, ROOT)
    e_s, e_1 = student_exponentials(x_s, s, max_s[:, None], k, EXACT, ROOT, POWER)
    if SOFT:
        x_t = teacher_exponent(t, max_t[:, None], k_t, EXACT)
        e_t = tl.exp2(x_t)
        if ENTROPY:
            others = tl.where(t == max_t[:, None], 0.0, e_t)
            h += tl.sum(others * tl.maximum(x_t, -256.0), 1)  # 0 log 0 = 0
            rest += tl.sum(others, 1)
        delta = difference(s, t, to[2][:, None], to[4][:, None]) * k if EXACT else log2_ratio(x_s, x_t, ROOT)
        first = tl.where(e_t > 0, e_t * delta, 0.0)  # 0 log 0 = 0; -inf student: -inf
        near = first * (delta * phi_over_square(delta, 3))
        if EXACT:
            e_s *= unlagged(to[3])[:, None]
        # (b2 first: that takes a third of the registers.)
        b2 += tl.sum(tl.where(tl.abs(delta) < SMALL, near, e_s - tl.fma(first, LN2, e_t)), 1)
        if EXACT:
            excess += tl.sum(tl.where(tl.abs(delta) < SMALL, tl.fma(first, LN2, near), e_s - e_t), 1)
        z_s += tl.sum(e_s, 1)
        z_t += tl.sum(e_t, 1)
        b1 += tl.sum(first, 1)
    if HARD:
        z_1 += tl.sum(tl.where(columns == label, 0.0, e_1) if EDGE else e_1, 1)
        if SMOOTHED:
            total += tl.sum(tl.where(columns < vocabulary, s, 0.0) if EDGE else s, 1)
    return (max_s, max_t, z_s, z_t, b1, b2, h, z_1, total, excess, rest), to


@triton.jit
def merged(
    part,
    own,
    k,
    k_t,
    SOFT: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXACT: tl.constexpr,
    ROOT: tl.constexpr,
    POWER: tl.constexpr,
):
    """One part of many.

    It is measured from where the mean of delta under p is 0, or near: there B1 is small, and a student's logit that
    sticks out does not matter. Where one token has all of p, it is measured from the maxima, so that delta is 0 there;
    and where an exponential from elsewhere would overflow, they have to do.
    """
    point_s, point_t = tl.max(part[0], 0), tl.max(part[1], 0)
    to = centre(point_s, point_t, k, k_t, EXACT, ROOT)
    if SOFT:
        z_t, b1 = part[3], part[4]
        down_t = own[1] - to[1]
        apart = delta_between(own, to, k, EXACT, ROOT)
        mass = tl.exp2(down_t) * z_t
        total = tl.sum(mass, 0)
        mean = tl.sum(tl.where(mass > 0, tl.exp2(down_t) * tl.fma(apart, z_t, b1), 0.0), 0) / total
        mean_s = point_s + mean / k
        reached = (tl.abs(mean_s - point_s) * tl.maximum(k, LOG2E) <= REACH) & (k_t <= 256)
        spread = reached & (total > 2) & (tl.abs(mean) < float("inf"))
        point_s = tl.where(spread, mean_s, point_s)
        to = centre(point_s, point_t, k, k_t, EXACT, ROOT)
    z_s, z_t, b1, b2, h, z_1, total, excess, rest = moved(
        part, own, point_s, point_t, to, k, k_t, SOFT, ENTROPY, EXACT, ROOT, POWER
    )
    zero = tl.zeros_like(point_s)
    if SOFT:
        z_s, z_t, h, b1, b2 = tl.sum(z_s, 0), tl.sum(z_t, 0), tl.sum(h, 0), tl.sum(b1, 0), tl.sum(b2, 0)
    else:
        z_s, z_t, h, b1, b2 = zero, zero, zero, zero, zero
    excess = tl.sum(excess, 0) if SOFT and EXACT else zero
    rest = tl.sum(rest, 0) if SOFT else zero
    return (point_s, point_t, z_s, z_t, b1, b2, h, tl.sum(z_1, 0), tl.sum(total, 0), excess, rest)


@triton.jit
def joined(
    a,
    b,
    k,
    k_t,
    SOFT: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXACT: tl.constexpr,
    ROOT: tl.constexpr,
    POWER: tl.constexpr,
):
    """One part of two."""
    both = (
        tl.join(a[0], b[0]),
        tl.join(a[1], b[1]),
        tl.join(a[2], b[2]),
        tl.join(a[3], b[3]),
        tl.join(a[4], b[4]),
        tl.join(a[5], b[5]),
        tl.join(a[6], b[6]),
        tl.join(a[7], b[7]),
        tl.join(a[8], b[8]),
        tl.join(a[9], b[9]),
        tl.join(a[10], b[10]),
    )
    return merged(both, centre(both[0], both[1], k, k_t, EXACT, ROOT), k, k_t, SOFT, ENTROPY, EXACT, ROOT, POWER)


@triton.jit
def off_grid(point_s, point_t, k, k_t, EXACT: tl.constexpr, ROOT: tl.constexpr):
    """log2 of the exponentials at the points themselves: what references leave over."""
    rest_s = ROOT * student_exponent(point_s, point_s, k, EXACT, ROOT)
    return rest_s, teacher_exponent(point_t, point_t, k_t, EXACT)


@triton.jit
def finished_soft(part, k, k_t, ENTROPY: tl.constexpr, EXACT: tl.constexpr, ROOT: tl.constexpr):
    """The soft term; and what stats have of it: both sums, measured from the points, and the log of their ratio."""
    point_s, point_t, z_s, z_t, b1, b2, h, _, _, excess, rest = part
    zero = point_s * 0.0
    b1 *= LN2
    x = (excess if EXACT else b1 + b2) / z_t
    second = b2 / z_t
    less = log1p_less(x)
    near = tl.abs(x) < 0.5

    rest_s, rest_t = off_grid(point_s, point_t, k, k_t, EXACT, ROOT)
    student_sum = z_s / tl.exp2(rest_s - centre(point_s, point_t, k, k_t, EXACT, ROOT)[3])
    teacher_sum = z_t / tl.exp2(rest_t)
    gap = zero if EXACT else (rest_s - rest_t) * LN2  # delta at the points
    log_ratio = tl.where(near, x + less - gap, tl.log2(student_sum / teacher_sum) * LN2)
    # The last bits of the gap say nothing: where one column has all of p and q, this is 0.
    log_ratio = tl.where(tl.abs(log_ratio) < 5e-7 * tl.abs(gap), 0.0, log_ratio)

    # Close to the teacher, B2 carries the value; far from it, B2 is large and B1 does.
    soft = tl.where(near & (second < 0.5), less + second, log_ratio + gap - b1 / z_t)
    soft = tl.where(soft < 0, 0.0, soft)
    if ENTROPY:
        # log(z_t) from what z_t has beside the columns at the point, and their number: 0 if it is no column's logit.
        at_point = tl.exp2(rest_t)
        number = tl.floor((z_t - rest) / at_point + 0.5)
        beside = rest / at_point + (number - 1)
        log_sum = tl.where(tl.abs(beside) < 0.5, beside + log1p_less(beside), tl.log2(1 + beside) * LN2)
        soft += log_sum - tl.fma(-rest_t, rest, h) / z_t * LN2
    whole = (z_s != 0) & (z_t != 0)  # else a row of -inf
    return tl.where(whole, soft, float("nan")), student_sum, teacher_sum, log_ratio


@triton.jit
def finished_hard(
    part,
    logit,
    vocabulary,
    smoothing,
    k,
    SMOOTHED: tl.constexpr,
    EXACT: tl.constexpr,
    ROOT: tl.constexpr,
    POWER: tl.constexpr,
):
    """-log softmax(s)[label] and 1 - softmax(s)[label], from the other columns' sum, so that a sure and right student
    keeps its digits; and the sum over all columns, measured from the point."""
    point_s, z_1, total = part[0], part[7], part[8]
    exponent = hard_exponent(logit, point_s, k, EXACT, ROOT, POWER)
    own = tl.exp2(exponent)
    ratio = z_1 / own
    hard_sum = z_1 + own
    hard = tl.where(ratio < 0.5, ratio + log1p_less(ratio), (tl.log2(hard_sum) - exponent) * LN2)
    if SMOOTHED:
        hard += tl.where(hard < float("inf"), smoothing * (logit - total / vocabulary), 0.0)  # inf - inf is no loss
    at_point = tl.exp2(hard_exponent(point_s, point_s, k, EXACT, ROOT, POWER))
    return tl.where(hard_sum != 0, hard, float("nan")), hard_sum / at_point, z_1 / hard_sum


@triton.jit
def gradient_scales(
    stats,
    target,
    coef_soft,
    coef_hard,
    vocabulary,
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
):
    """Of gradient = by_t (ratio e_s - e_t) + by_1 e_1 + constant; at the label, at_label in the place of by_1 e_1."""
    point_s, point_t, student_sum, teacher_sum, log_ratio, hard_sum, miss = stats
    by_t, ratio, apart, then = 0.0, 0.0, 0.0, 0.0
    if SOFT:
        rest_s, rest_t = off_grid(point_s, point_t, k, k_t, EXACT, ROOT)
        by_t = coef_soft * unit / (teacher_sum * tl.exp2(rest_t))
        ratio = teacher_sum / student_sum * tl.exp2(rest_t - rest_s)
        log_ratio *= LOG2E
        if EXACT:
            apart, then = between(point_s, point_t)
        else:
            log_ratio += rest_s - rest_t
    by_1, constant, at_label = 0.0, 0.0, 0.0
    if HARD:
        if target >= 0:
            by_1 = coef_hard / (hard_sum * tl.exp2(hard_exponent(point_s, point_s, k, EXACT, ROOT, POWER)))
            # softmax(s)[label] - 1 would lose what a sure student has left to learn.
            at_label = -coef_hard * miss
            if SMOOTHED:
                constant = -coef_hard * smoothing / vocabulary
                at_label += coef_hard * smoothing + constant
    return point_s, point_t, apart, then, by_t, ratio, log_ratio, by_1, constant, at_label


@triton.jit
def gradient(
    s,
    t,
    columns,
    label,
    scales,
    k,
    k_t,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTHED: tl.constexpr,
    EXACT: tl.constexpr,
    ROOT: tl.constexpr,
    POWER: tl.constexpr,
    FINE: tl.constexpr,
    EDGE: tl.constexpr,
):
    """FINE: for a gradient in float32."""
    point_s, point_t, apart, then, by_t, ratio, log_ratio, by_1, constant, at_label = scales
    x_s = student_exponent(s, point_s, k, EXACT, ROOT)
    e_s, e_1 = student_exponentials(x_s, s, point_s, k, EXACT, ROOT, POWER)
    g = tl.zeros_like(s)
    if HARD:
        g = tl.fma(by_1, e_1, constant) if SMOOTHED else by_1 * e_1
        if EDGE:
            g = tl.where(columns == label, at_label, g)
    if SOFT:
        x_t = teacher_exponent(t, point_t, k_t, EXACT)
        e_t = tl.exp2(x_t)
        # Where log2(q / p) is small, the difference of p and q has lost its digits.
        exact = difference(s, t, apart, then)
        if FINE:
            d = tl.fma(exact, k, -log_ratio) if EXACT else log2_ratio(x_s, x_t, ROOT) - log_ratio
            near = (e_t * d) * tl.fma(d, phi_over_square(d, 4), LN2)
            close = tl.abs(d) < SMALL
        else:
            # q - p is log(q / p) times the logarithmic mean of p and q, and that is almost their mean.
            half = tl.fma(log2_ratio(x_s, x_t, ROOT), LN2 / 2, log_ratio * (-LN2 / 2))
            near = half * tl.fma(ratio, e_s, e_t)
            close = tl.abs(half) < SMALL_16 / 2
        g = tl.fma(tl.where(close, near, tl.fma(ratio, e_s, -e_t)), by_t, g)
    return g
