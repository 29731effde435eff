"""The mathematics of a row for the Triton kernels: what csrc/row_math.h is to the native ones.

The sums are those of docs/design.md, with differences that a GPU asks for: exponentials are powers of 2, as
`triton_exponents.py` explains, and a row is read by lanes.

A tile of a row is viewed as [LANES, n]: every thread is a lane and keeps a part of its own, measured from its own
maxima. Nothing crosses lanes until a section of the row has been read.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fused_kd.backends.triton_exponents import (
    LN2,
    LOG2E,
    SMALL,
    between,
    difference,
    hard_exponent,
    log1p_less,
    log2_ratio,
    off_grid,
    phi_over_square,
    reference,
    student_exponent,
    student_exponentials,
    teacher_exponent,
    unlagged,
)

# The maximum of nothing, finite on every scale. A counted row with no logit above it is one of -inf.
LOWEST = tl.constexpr(-1e28)
# How far above its point, on the log2 scale, a logit may lie.
REACH = tl.constexpr(60.0)


class Part(NamedTuple):
    """What has been read of a row by one lane, by one program or by all: scalars, or one number a lane.

    Two points, and sums that are measured from them. For reverse KL, B1, B2 and the excess are those of the roles
    exchanged: e_t for e_s, e_s for e_t, -delta for delta.
    """

    point_s: tl.tensor  # a lane's are its maxima
    point_t: tl.tensor
    z_s: tl.tensor  # e_s 2^-lag
    z_t: tl.tensor  # e_t
    b1: tl.tensor
    b2: tl.tensor
    h: tl.tensor  # e_t log2(e_t) over the columns that do not lie at point_t, for the teacher's entropy
    z_1: tl.tensor  # exp(s) over the columns other than the label
    total: tl.tensor  # s, for label smoothing
    excess: tl.tensor  # exact: e_s 2^-lag - e_t. It is B1 ln 2 + B2, but the two may be large and cancel
    rest: tl.tensor  # e_t where h is summed up: of a sure teacher it is what z_t has beside 1, and would lose


PARTS = tl.constexpr(len(Part._fields))


class Centre(NamedTuple):
    """The points that a part is measured from, and what goes with them."""

    point_s: tl.tensor
    point_t: tl.tensor
    root: tl.tensor  # of S: S / root of the switches
    at_t: tl.tensor  # T
    lag: tl.tensor
    apart: tl.tensor  # as `between` has it
    then: tl.tensor


class Stats(NamedTuple):
    """What the gradient of a row takes from its terms."""

    point_s: tl.tensor
    point_t: tl.tensor
    student_sum: tl.tensor
    teacher_sum: tl.tensor
    log_ratio: tl.tensor
    hard_sum: tl.tensor
    miss: tl.tensor
    growth: tl.tensor  # of other divergences
    top: tl.tensor


@triton.jit
def roles(of_s, of_t, SWITCHES: tl.constexpr):
    """What is the base's and the other's of KL(base || other), whose sums these are."""
    if SWITCHES.family == "reverse_kl":
        base, other = of_s, of_t
    else:
        base, other = of_t, of_s
    return base, other


@triton.jit
def nothing(like):
    """The part of a row of which nothing was read, in the shape of `like`."""
    zero = like * 0.0
    return Part(zero + LOWEST, zero + LOWEST, zero, zero, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def centre(point_s, point_t, scalars, SWITCHES: tl.constexpr):
    root = reference(point_s, scalars.k / SWITCHES.root, SWITCHES.exact)
    at_t = reference(point_t, scalars.k_t, SWITCHES.exact)
    lag = root * 0.0
    if SWITCHES.exact:
        lag = (point_s - point_t) * scalars.k - (SWITCHES.root * root - at_t)
        lag = tl.where(tl.abs(lag) < 0.0625, lag, 0.0)  # no column is there, or one too large for a grid
    apart, then = between(point_s, point_t)
    return Centre(point_s, point_t, root, at_t, lag, apart, then)


@triton.jit
def delta_between(own, to, scalars, SWITCHES: tl.constexpr):
    """What delta grows by from one centre to another."""
    if SWITCHES.exact:  # (What lies on the grid has exact differences; point_s - point_t has none.)
        grown = ((own.apart - to.apart) + (own.then - to.then)) * scalars.k
    else:
        grown = SWITCHES.root * (own.root - to.root) - (own.at_t - to.at_t)
    return -grown if SWITCHES.family == "reverse_kl" else grown


@triton.jit
def moved(part, own, to, scalars, SWITCHES: tl.constexpr, LAST: tl.constexpr = True):
    """The part, from its `own` centre to another: none so far below its own that an exponential overflows.

    Not LAST: of a lane, which is one of many and will be moved again.
    """
    own_s, own_t, z_s, z_t, b1, b2, h, z_1, total, excess, rest = part
    down_root = own.root - to.root
    if SWITCHES.power:
        down_1 = SWITCHES.power * down_root
    else:
        down_1 = reference(own_s, LOG2E, SWITCHES.exact) - reference(to.point_s, LOG2E, SWITCHES.exact)
    z_1 *= tl.exp2(down_1)
    if SWITCHES.soft:
        down_s = SWITCHES.root * down_root
        down_t = own.at_t - to.at_t
        d = delta_between(own, to, scalars, SWITCHES)
        by_s = tl.exp2(down_s + (own.lag - to.lag) if SWITCHES.exact else down_s)
        by_t = tl.exp2(down_t)
        by, by_other = roles(by_s, by_t, SWITCHES)
        z, z_other = roles(z_s, z_t, SWITCHES)
        bend = by * (d * d * phi_over_square(d, 3))
        near = tl.abs(d) < SMALL
        growth = tl.where(near, tl.fma(by * d, LN2, bend), by_other - by)  # by (2^d - 1)
        bend = tl.where(near, bend, tl.fma(by * d, -LN2, growth))  # by phi(d)
        far = b2 > z_other
        b2 = tl.fma(bend, z, tl.fma(growth, b1 * LN2, by_other * b2))
        if SWITCHES.exact:
            excess = tl.fma(growth, z, by_other * excess)
        b1 = tl.where(by > 0, by * tl.fma(d, z, b1), 0.0)  # b1 may be -inf
        if SWITCHES.entropy:
            # What lay at its point, at the exponent that the reference leaves over, does no more.
            here = own_t == to.point_t
            left_over = tl.where(z_t > 0, teacher_exponent(own_t, own_t, scalars, SWITCHES), 0.0)
            h = tl.where(here, h, by_t * tl.fma(down_t, z_t, tl.fma(z_t - rest, left_over, h)))
            rest = tl.where(here, rest, by_t * z_t)
        z_s *= by_s
        z_t *= by_t
        if LAST:
            # Far from the teacher those terms cancel; what they leave is in z_s and z_t.
            z, z_other = roles(z_s, z_t, SWITCHES)
            b2 = tl.where(far, (z_other - z) - b1 * LN2, b2)
            excess = tl.where(far, z_other - z, excess)
    return Part(to.point_s, to.point_t, z_s, z_t, b1, b2, h, z_1, total, excess, rest)


@triton.jit
def extended(part, own, s, t, columns, vocabulary, label, scalars, SWITCHES: tl.constexpr, EDGE: tl.constexpr):
    """The lanes' parts with one more tile, and their centres.

    An EDGE tile may hold the label, and -inf where it reaches past the row.
    """
    max_s = tl.maximum(part.point_s, tl.max(s, 1))
    max_t = tl.maximum(part.point_t, tl.max(t, 1)) if SWITCHES.soft else part.point_t
    to = centre(max_s, max_t, scalars, SWITCHES)
    _, _, z_s, z_t, b1, b2, h, z_1, total, excess, rest = moved(part, own, to, scalars, SWITCHES, LAST=False)
    x_s = student_exponent(s, max_s[:, None], scalars, SWITCHES)
    e_s, e_1 = student_exponentials(x_s, s, max_s[:, None], scalars, SWITCHES)
    if SWITCHES.soft:
        x_t = teacher_exponent(t, max_t[:, None], scalars, SWITCHES)
        e_t = tl.exp2(x_t)
        if SWITCHES.entropy:
            others = tl.where(t == max_t[:, None], 0.0, e_t)
            h += tl.sum(others * tl.maximum(x_t, -256.0), 1)  # 0 log 0 = 0
            rest += tl.sum(others, 1)
        if SWITCHES.exact:
            delta = difference(s, t, to.apart[:, None], to.then[:, None]) * scalars.k
        else:
            delta = log2_ratio(x_s, x_t, SWITCHES.root)
        REVERSE: tl.constexpr = SWITCHES.family == "reverse_kl"
        if REVERSE:
            delta = -delta
        if SWITCHES.exact and REVERSE:
            e_s *= unlagged(to.lag)[:, None]
        e, _ = roles(e_s, e_t, SWITCHES)
        first = tl.where(e > 0, e * delta, 0.0)  # 0 log 0 = 0; -inf student: -inf
        near = first * (delta * phi_over_square(delta, 3))
        if SWITCHES.exact and not REVERSE:  # (Before its use, but no sooner: the compiler keeps to this order.)
            e_s *= unlagged(to.lag)[:, None]
        e, e_other = roles(e_s, e_t, SWITCHES)
        # (b2 first: that takes a third of the registers.)
        b2 += tl.sum(tl.where(tl.abs(delta) < SMALL, near, e_other - tl.fma(first, LN2, e)), 1)
        if SWITCHES.exact:
            excess += tl.sum(tl.where(tl.abs(delta) < SMALL, tl.fma(first, LN2, near), e_other - e), 1)
        z_s += tl.sum(e_s, 1)
        z_t += tl.sum(e_t, 1)
        b1 += tl.sum(first, 1)
    if SWITCHES.hard:
        z_1 += tl.sum(tl.where(columns == label, 0.0, e_1) if EDGE else e_1, 1)
        if SWITCHES.smoothed:
            total += tl.sum(tl.where(columns < vocabulary, s, 0.0) if EDGE else s, 1)
    return Part(max_s, max_t, z_s, z_t, b1, b2, h, z_1, total, excess, rest), to


@triton.jit
def sum_of(x, KNOWN: tl.constexpr):
    """Over the lanes; nothing is added up that the switches leave out."""
    return tl.sum(x, 0) if KNOWN else tl.zeros([], tl.float32)


@triton.jit
def merged(part, own, scalars, SWITCHES: tl.constexpr):
    """One part of many.

    It is measured from where the mean of delta under p is 0, or near: there B1 is small, and a student's logit that
    sticks out does not matter. Where one token has all of p, it is measured from the maxima, so that delta is 0 there;
    and where an exponential from elsewhere would overflow, they have to do. (Reverse KL: under q, and the teacher's
    point moves.)
    """
    point_s, point_t = tl.max(part.point_s, 0), tl.max(part.point_t, 0)
    to = centre(point_s, point_t, scalars, SWITCHES)
    if SWITCHES.soft:
        if SWITCHES.family == "reverse_kl":
            down, z = SWITCHES.root * (own.root - to.root), part.z_s
        else:
            down, z = own.at_t - to.at_t, part.z_t
        apart = delta_between(own, to, scalars, SWITCHES)
        mass = tl.exp2(down) * z
        total = tl.sum(mass, 0)
        mean = tl.sum(tl.where(mass > 0, tl.exp2(down) * tl.fma(apart, z, part.b1), 0.0), 0) / total
        if SWITCHES.family == "reverse_kl":
            mean_t = point_t + mean / scalars.k_t
            reached = (tl.abs(mean_t - point_t) * scalars.k_t <= REACH) & (scalars.k <= 256)
            spread = reached & (total > 2) & (tl.abs(mean) < float("inf"))
            to = centre(point_s, tl.where(spread, mean_t, point_t), scalars, SWITCHES)
        else:
            mean_s = point_s + mean / scalars.k
            reached = (tl.abs(mean_s - point_s) * tl.maximum(scalars.k, LOG2E) <= REACH) & (scalars.k_t <= 256)
            spread = reached & (total > 2) & (tl.abs(mean) < float("inf"))
            to = centre(tl.where(spread, mean_s, point_s), point_t, scalars, SWITCHES)
    part = moved(part, own, to, scalars, SWITCHES)
    SOFT: tl.constexpr = SWITCHES.soft
    return Part(
        to.point_s,
        to.point_t,
        z_s=sum_of(part.z_s, SOFT),
        z_t=sum_of(part.z_t, SOFT),
        b1=sum_of(part.b1, SOFT),
        b2=sum_of(part.b2, SOFT),
        h=sum_of(part.h, SOFT),
        z_1=sum_of(part.z_1, True),
        total=sum_of(part.total, True),
        excess=sum_of(part.excess, SOFT and SWITCHES.exact),
        rest=sum_of(part.rest, SOFT),
    )


@triton.jit
def joined(a, b, scalars, SWITCHES: tl.constexpr):
    """One part of two."""
    pairs = ()
    for i in tl.static_range(PARTS):
        pairs += (tl.join(a[i], b[i]),)  # type: ignore[assignment]
    both = Part(*pairs)  # type: ignore[call-arg]
    return merged(both, centre(both.point_s, both.point_t, scalars, SWITCHES), scalars, SWITCHES)


@triton.jit
def finished_soft(part, scalars, SWITCHES: tl.constexpr):
    """The soft term; and what stats have of it: both sums, measured from the points, the log of their ratio, and TOP
    of reverse KL."""
    point_s, point_t, z_s, z_t, b1, b2, h, _, _, excess, rest = part
    zero = point_s * 0.0
    z, _ = roles(z_s, z_t, SWITCHES)
    b1 *= LN2
    x = (excess if SWITCHES.exact else b1 + b2) / z
    second = b2 / z
    less = log1p_less(x)
    near = tl.abs(x) < 0.5

    rest_s, rest_t = off_grid(point_s, point_t, scalars, SWITCHES)
    student_sum = z_s / tl.exp2(rest_s - centre(point_s, point_t, scalars, SWITCHES).lag)
    teacher_sum = z_t / tl.exp2(rest_t)
    own_rest, other_rest = roles(rest_s, rest_t, SWITCHES)
    gap = zero if SWITCHES.exact else (other_rest - own_rest) * LN2  # delta at the points
    base_sum, other_sum = roles(student_sum, teacher_sum, SWITCHES)
    log_ratio = tl.where(near, x + less - gap, tl.log2(other_sum / base_sum) * LN2)
    # The last bits of the gap say nothing: where one column has all of p and q, this is 0.
    log_ratio = tl.where(tl.abs(log_ratio) < 5e-7 * tl.abs(gap), 0.0, log_ratio)

    # Close to the teacher, B2 carries the value; far from it, B2 is large and B1 does.
    soft = tl.where(near & (second < 0.5), less + second, log_ratio + gap - b1 / z)
    soft = tl.where(soft < 0, 0.0, soft)
    top = zero
    if SWITCHES.family == "reverse_kl":
        log_ratio = -log_ratio
        top = b1 / z - gap
        top = tl.where(tl.abs(top) < float("inf"), top, float("nan"))
    if SWITCHES.entropy:
        # log(z_t) from what z_t has beside the columns at the point, and their number: 0 if it is no column's logit.
        at_point = tl.exp2(rest_t)
        number = tl.floor((z_t - rest) / at_point + 0.5)
        beside = rest / at_point + (number - 1)
        log_sum = tl.where(tl.abs(beside) < 0.5, beside + log1p_less(beside), tl.log2(1 + beside) * LN2)
        soft += log_sum - tl.fma(-rest_t, rest, h) / z_t * LN2
    whole = (z_s != 0) & (z_t != 0)  # else a row of -inf
    return tl.where(whole, soft, float("nan")), student_sum, teacher_sum, log_ratio, top


@triton.jit
def finished_hard(part, logit, vocabulary, scalars, SWITCHES: tl.constexpr):
    """-log softmax(s)[label] and 1 - softmax(s)[label], from the other columns' sum, so that a sure and right student
    keeps its digits; and the sum over all columns, measured from the point."""
    exponent = hard_exponent(logit, part.point_s, scalars, SWITCHES)
    own = tl.exp2(exponent)
    ratio = part.z_1 / own
    hard_sum = part.z_1 + own
    hard = tl.where(ratio < 0.5, ratio + log1p_less(ratio), (tl.log2(hard_sum) - exponent) * LN2)
    if SWITCHES.smoothed:
        hard += tl.where(
            hard < float("inf"), scalars.smoothing * (logit - part.total / vocabulary), 0.0
        )  # inf - inf is no loss
    at_point = tl.exp2(hard_exponent(part.point_s, part.point_s, scalars, SWITCHES))
    return tl.where(hard_sum != 0, hard, float("nan")), hard_sum / at_point, part.z_1 / hard_sum
