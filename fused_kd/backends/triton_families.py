"""Every divergence but the forward KL, for the Triton kernels: `fused_kd/families.py` is where the formulas are from.

The sums of `triton_math.py` make p, q and d = log(q / p) of a column. A second sweep over the row sums up v and c, and
the gradient of a column, times tau, is c - q G with G = sum c. Adding a family is a function here, a case in `terms`,
and one in `family_switches` of `triton.py`.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fused_kd.backends.triton_exponents import (
    LN2,
    LOG2E,
    between,
    difference,
    log2_ratio,
    off_grid,
    power,
    student_exponent,
    teacher_exponent,
)
from fused_kd.backends.triton_rest import RestSums, merged_rest, no_rest, rest_slope

# In the place of infinity, where 0 inf is 0.
LARGE = tl.constexpr(3e38)
# Where log(1 + x) is a polynomial.
LOG_REACH = tl.constexpr(-0.125)
# Where 1 - exp(-x) is.
EXP_REACH = tl.constexpr(0.25)


class Measured(NamedTuple):
    """What makes a column's p, q and d of its logits, the same for a whole row."""

    point_s: tl.tensor
    point_t: tl.tensor
    apart: tl.tensor  # as `between` has it
    then: tl.tensor
    by_s: tl.tensor  # 1 / Z_s, measured as exponentials are
    by_t: tl.tensor
    log2_by: tl.tensor  # log2(by_s / by_t)
    log_ratio: tl.tensor  # what to take off delta
    scale: tl.tensor  # in which `terms` measures v and c
    below: tl.tensor  # log2(by_t^k / scale), k as in `alpha_beta_terms`


class Column(NamedTuple):
    p: tl.tensor
    q: tl.tensor
    d: tl.tensor
    x_s: tl.tensor  # log2 of q / by_s and of p / by_t
    x_t: tl.tensor


class Sums(NamedTuple):
    """Of the second sweep: over a lane's columns, a section's or the row's."""

    value: tl.tensor  # v
    growth: tl.tensor  # c
    rest_growth: tl.tensor  # c and q where q <= 1/2: in a column with nearly all of q, c - q G is what the others have
    rest_q: tl.tensor


class Squares(NamedTuple):
    """The same of LogitMSE, of x - y where both are finite. As many numbers as Sums has."""

    count: tl.tensor
    mean: tl.tensor  # 0 if not centred
    squares: tl.tensor  # of what x - y is off the mean
    unused: tl.tensor


SUMS = tl.constexpr(len(Sums._fields))


@triton.jit
def measured(stats, scalars, SWITCHES: tl.constexpr):
    rest_s, rest_t = off_grid(stats.point_s, stats.point_t, scalars, SWITCHES)
    by_s = 1 / (stats.student_sum * tl.exp2(rest_s))
    by_t = 1 / (stats.teacher_sum * tl.exp2(rest_t))
    apart, then = between(stats.point_s, stats.point_t)
    # Reverse KL: what q log(q / p) exceeds its sum by, and that is q (delta + top).
    log_ratio = -stats.top if SWITCHES.family == "reverse_kl" else stats.log_ratio
    if not SWITCHES.exact:
        log_ratio += (rest_s - rest_t) * LN2
    scale, below = by_t * 0 + 1.0, by_t * 0
    if SWITCHES.family == "alpha_beta":
        # by_t^k, unless q^k may be too large for that unit.
        power_t = (scalars.family[0] + scalars.family[1]) * tl.log2(by_t)
        unit = tl.maximum(power_t, -64.0)
        scale, below = tl.exp2(unit), power_t - unit
    elif SWITCHES.family == "alpha":
        scale = by_t
    elif SWITCHES.family == "variation":
        scale *= 0.5
    log2_by = tl.log2(by_s / by_t)
    return Measured(stats.point_s, stats.point_t, apart, then, by_s, by_t, log2_by, log_ratio, scale, below)


@triton.jit
def column_of(s, t, at, scalars, SWITCHES: tl.constexpr):
    x_s = student_exponent(s, at.point_s, scalars, SWITCHES)
    x_t = teacher_exponent(t, at.point_t, scalars, SWITCHES)
    if SWITCHES.exact:
        d = tl.fma(difference(s, t, at.apart, at.then), scalars.k * LN2, -at.log_ratio)
    else:
        d = tl.fma(log2_ratio(x_s, x_t, SWITCHES.root), LN2, -at.log_ratio)
    q = power(tl.exp2(x_s), SWITCHES.root) * at.by_s
    return Column(tl.exp2(x_t) * at.by_t, q, d, x_s * SWITCHES.root, x_t)


@triton.jit
def terms(column, at, scalars, SWITCHES: tl.constexpr):
    """v and c of a column, in units of `at.scale`."""
    of = scalars.family
    if SWITCHES.family == "linear":
        v, c = linear_terms(column, of)
    elif SWITCHES.family == "mixture":
        v, c = mixture_terms(column, of, True, SWITCHES)
    elif SWITCHES.family == "jensen_shannon":
        v, c = mixture_terms(column, of, False, SWITCHES)
    elif SWITCHES.family == "alpha":
        v, c = alpha_beta_terms(column, tl.exp2(column.x_t), column.q * (1 / at.by_t), of, at, SWITCHES)
    elif SWITCHES.family == "alpha_beta":
        k = of[0] + of[1]
        of_p = tl.exp2(tl.fma(column.x_t, k, at.below))
        of_q = tl.exp2(tl.fma(column.x_s, k, k * at.log2_by + at.below))
        v, c = alpha_beta_terms(column, of_p, of_q, of, at, SWITCHES)
    else:
        tl.static_assert(SWITCHES.family == "variation")
        v, c = variation_terms(column)
    return v, c


@triton.jit
def minus(x):
    return x * -1.0  # (For -x Triton 3.6 takes 0 - x, and that is an instruction.)


@triton.jit
def polynomial(d, of, FIRST: tl.constexpr):
    """Of degree 5, its coefficients from number FIRST on."""
    value = of[FIRST + 5]
    for i in tl.static_range(5):
        value = tl.fma(d, value, of[FIRST + 4 - i])
    return value


@triton.jit
def or_near(v, c, base, d, of):
    """v and c, or what the family's polynomials say where |d| is small and they cancel."""
    near = tl.abs(d) < of[3]
    first = base * d
    return tl.where(near, first * d * polynomial(d, of, 4), v), tl.where(near, first * polynomial(d, of, 10), c)


@triton.jit
def linear_terms(column, of):
    p, q, d, _, _ = column
    forward = of[0]
    change = q - p
    reverse = (1 - forward) * (q * tl.maximum(d, -LARGE))  # 0 log 0 = 0; q log(q / 0) = inf
    less = p * tl.minimum(d, LARGE)
    v = tl.fma(-forward, less, tl.fma(2 * forward - 1, change, reverse))
    return or_near(v, tl.fma(forward, change, reverse), p, d, of)


@triton.jit
def mixture_terms(column, of, LEVEL: tl.constexpr, SWITCHES: tl.constexpr):
    """LEVEL: unless it is 0, as `fused_kd.families.Mixture` has it."""
    p, q, d, _, _ = column
    share, of_p, of_q = of[0], of[1], of[2]
    capped = tl.minimum(tl.maximum(d, -LARGE), LARGE)
    share_of_smaller = tl.where(d > 0, share, 1 - share)
    ratio = tl.exp2(tl.abs(capped) * -LOG2E)
    less = tl.fma(ratio, share_of_smaller, minus(share_of_smaller))
    w = 1 + less  # m / max(p, q)
    if SWITCHES.careful:
        w = tl.fma(ratio, share_of_smaller, tl.where(d > 0, 1 - share, share))
    log2_w = near_log2(w, SWITCHES)
    if SWITCHES.careful:
        log_w = tl.where(less > LOG_REACH, log1p(less), log2_w * LN2)
        log_q = tl.minimum(capped, 0.0) - log_w  # log(q / m)
        log_p = tl.minimum(minus(capped), 0.0) - log_w
    else:
        log_q = tl.fma(log2_w, -LN2, tl.minimum(capped, 0.0))
        log_p = tl.fma(log2_w, -LN2, tl.minimum(minus(capped), 0.0))
    c = of_q * (q * log_q)
    v = tl.fma(of_p, p * log_p, c)
    if LEVEL:
        level = of_p * (1 - share) - of_q * share
        v = tl.fma(level, q - p, v)
        c = tl.fma(level, tl.fma(minus(tl.minimum(p, q)), tl.exp2(minus(log2_w)), q), c)
    return or_near(v, c, p, d, of)


@triton.jit
def alpha_beta_terms(column, of_p, of_q, of, at, SWITCHES: tl.constexpr):
    """`of_p`, `of_q`: p^k and q^k, k = a + b."""
    d = column.d
    a, b = of[0], of[1]
    k = a + b
    if SWITCHES.careful:
        # With base the larger of p^k and q^k, they and p^a q^b are base times 1, exp(-a |d|) and exp(-b |d|).
        base = tl.maximum(of_p, of_q)
        away = tl.minimum(tl.abs(d), LARGE)
        small, large = tl.minimum(a, b), tl.maximum(a, b)
        drop_small, drop_large = one_less_exp(away * small), 1 - tl.exp2(away * (large * -LOG2E))
        by_small, by_large = drop_small * (1 / small), drop_large * (1 / large)
        above = d > 0
        led_by_small = above == (a < b)
        v = tl.where(
            led_by_small, tl.fma(drop_small - 1, by_large, by_small), tl.fma(drop_large - 1, by_small, by_large)
        )
        v *= base * (1 / k)
        by_a, drop_b = tl.where(a < b, by_small, by_large), tl.where(a < b, drop_large, drop_small)
        c = tl.where(above, by_a, (drop_b - 1) * by_a) * base
        both = tl.fma(-base, tl.where(led_by_small, drop_small, drop_large), base)
    else:
        both = tl.exp2(tl.fma(column.x_t, a, tl.fma(column.x_s, b, b * at.log2_by + at.below)))
        c = (of_q - both) * (1 / a)
        v = tl.fma(of_p - both, 1 / (b * k), c * (1 / k))
    return or_near(v, c, both, d, of)


@triton.jit
def variation_terms(column):
    p, q, d, _, _ = column
    near = p * d * tl.fma(d, tl.fma(d, 1 / 6, 0.5), 1.0)
    change = tl.where(tl.abs(d) < 1 / 32, near, q - p)
    # q with the sign of d: of comparisons there would be twice as many instructions.
    sign = d.to(tl.int32, bitcast=True) & -0x80000000
    signed = (q.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.abs(change), tl.where(d == 0, 0.0, signed)


@triton.jit
def near_log2(w, SWITCHES: tl.constexpr):
    """log2(w) for 0 < w <= 1, to 2^-22."""
    if SWITCHES.ptx:  # (Triton's own costs 20 instructions.)
        log = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [w], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        log = tl.log2(w)
    return log


@triton.jit
def log1p(x):
    """log(1 + x) for LOG_REACH <= x <= 0, with its small values intact."""
    series = tl.fma(x, tl.fma(x, tl.fma(x, 1 / 7, -1 / 6), 1 / 5), -1 / 4)
    return x * tl.fma(x, tl.fma(x, tl.fma(x, series, 1 / 3), -1 / 2), 1.0)


@triton.jit
def one_less_exp(x):
    """1 - exp(-x) for x >= 0, with its small values intact."""
    series = tl.fma(x, tl.fma(x, tl.fma(x, -1 / 720, 1 / 120), -1 / 24), 1 / 6)
    near = x * tl.fma(x, tl.fma(x, series, -0.5), 1.0)
    return tl.where(x < EXP_REACH, near, 1 - tl.exp2(x * -LOG2E))


@triton.jit
def logit_difference(s, t, scalars):
    """Which columns count, and x - y there."""
    counts = (s != -float("inf")) & (t != -float("inf"))
    apart = tl.fma(t, -(scalars.k_t / scalars.k), s) * (scalars.k * LN2)
    return counts, tl.where(counts, apart, 0.0)


@triton.jit
def sums_of(numbers, SWITCHES: tl.constexpr):
    REST: tl.constexpr = SWITCHES.family == "rest"
    return Squares(*numbers) if SWITCHES.family == "logit_mse" else RestSums(*numbers) if REST else Sums(*numbers)


@triton.jit
def no_sums(like, SWITCHES: tl.constexpr):
    zero = like * 0.0
    return no_rest(zero) if SWITCHES.family == "rest" else sums_of((zero, zero, zero, zero), SWITCHES)


@triton.jit
def extended_sums(sums, s, t, at, scalars, SWITCHES: tl.constexpr):
    """The lanes' sums with one more tile. Where it reaches past the row it holds -inf, and that adds nothing."""
    if SWITCHES.family == "logit_mse":
        counts, apart = logit_difference(s, t, scalars)
        count = tl.sum(counts.to(tl.float32), 1)
        mean = tl.sum(apart, 1) / tl.maximum(count, 1.0) * scalars.family[0]
        off = tl.where(counts, apart - mean[:, None], 0.0)
        more = Squares(count, mean, tl.sum(off * off, 1), count * 0.0)
        result = more_squares(sums, more)
    else:
        column = column_of(s, t, at, scalars, SWITCHES)
        v, c = terms(column, at, scalars, SWITCHES)
        rest = column.q <= 0.5
        result = Sums(
            sums.value + tl.sum(v, 1),
            sums.growth + tl.sum(c, 1),
            sums.rest_growth + tl.sum(tl.where(rest, c, 0.0), 1),
            sums.rest_q + tl.sum(tl.where(rest, column.q, 0.0), 1),
        )
    return result


@triton.jit
def more_squares(a, b):
    """Of two sets of columns. Chan, Golub, LeVeque (1979)."""
    count = a.count + b.count
    share = b.count / tl.maximum(count, 1.0)
    apart = b.mean - a.mean
    mean = tl.fma(apart, share, a.mean)
    return Squares(count, mean, a.squares + b.squares + apart * apart * (a.count * share), a.unused)


@triton.jit
def merged_sums(sums, scalars, SWITCHES: tl.constexpr):
    """One of many."""
    if SWITCHES.family == "rest":
        numbers = merged_rest(sums, scalars)
    elif SWITCHES.family == "logit_mse":
        count = tl.sum(sums.count, 0)
        mean = tl.sum(sums.mean * (sums.count / tl.maximum(count, 1.0)), 0)
        off = sums.mean - mean
        numbers = count, mean, tl.sum(tl.fma(off * off, sums.count, sums.squares), 0), count * 0.0
    else:
        numbers = tl.sum(sums[0], 0), tl.sum(sums[1], 0), tl.sum(sums[2], 0), tl.sum(sums[3], 0)
    return sums_of(numbers, SWITCHES)


@triton.jit
def joined_sums(a, b, scalars, SWITCHES: tl.constexpr):
    """One of two."""
    pairs = ()
    for i in tl.static_range(SUMS):
        pairs += (tl.join(a[i], b[i]),)  # type: ignore[assignment]
    return merged_sums(sums_of(pairs, SWITCHES), scalars, SWITCHES)


@triton.jit
def finished_sums(sums, at, vocabulary, kl, SWITCHES: tl.constexpr):
    """The soft term, G and TOP of `fused_kd.backends.rows`. `kl`: the first sweep's, NaN where a row has no value."""
    if SWITCHES.family == "logit_mse":
        value, growth, top = sums.squares / (2 * sums.count), sums.mean, 1 / sums.count
    else:
        valid = (sums.value == sums.value) & (kl == kl)
        value = tl.where(valid, tl.where(vocabulary == 1, 0.0, sums.value * at.scale), float("nan"))
        growth = tl.where(valid & (tl.abs(sums.growth) < float("inf")), sums.growth, float("nan"))
        top = tl.fma(growth, sums.rest_q, -sums.rest_growth) * at.scale
        growth *= at.scale
    return value, growth, top


@triton.jit
def slope(s, t, at, growth, top, scalars, SWITCHES: tl.constexpr):
    """The soft term's gradient in a column, times tau, and measured as `growth` and `top` are."""
    if SWITCHES.family == "rest":
        rise = rest_slope(s, at[0], scalars)
    elif SWITCHES.family == "logit_mse":
        counts, apart = logit_difference(s, t, scalars)
        rise = tl.where(counts, (apart - growth) * top, 0.0)
    else:
        column = column_of(s, t, at, scalars, SWITCHES)
        if SWITCHES.family == "reverse_kl":
            rise = column.q * tl.maximum(column.d, -LARGE)  # 0 log 0 = 0
        else:
            _, c = terms(column, at, scalars, SWITCHES)
            rise = tl.where(column.q > 0.5, top, tl.fma(column.q, -growth, c))
    return rise
