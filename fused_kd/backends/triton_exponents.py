"""What the sums of `triton_math.py` add up for a column: exponentials, delta, and polynomials where it is small.

The log2 scale. Exponentials are powers of 2, and delta is on that scale too:

    e_s = 2^(s k - S)     e_t = 2^(t k_t - T)     S, T: references of the points measured from     k = log2(e) / tau
    delta = (s k - S) - (t k_t - T) - lag,  so e_s 2^-lag = e_t 2^delta
    B1 = sum e_t delta    B2 = sum e_t phi(delta),   phi(delta) = 2^delta - 1 - delta ln 2 >= 0

Exact, for float32 students: delta comes from s - t, which has no rounding where the two are close; references lie on
a grid, on which differences have none; and the lag is what the grid leaves over, so that delta is 0 at the points. (A
teacher that is sure of one token leaves nothing else to see.) Logits of 16 bits are never so close that the difference
of the exponents would not do: there the references are the points' own exponents, and the lag is 0.

Powers. At some temperatures exp(s / tau) = u^root and exp(s) = u^power; power = 0 where they are not.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# 1.5 * 2^11: a float32 near it is a multiple of 2^-12.
ROUND = tl.constexpr(3072.0)
# 1.5 * 2^23 / 256.
GRID = tl.constexpr(49152.0)
# Below this |delta|, 2^delta - 1 is a polynomial; above it, a difference of exponentials.
SMALL = tl.constexpr(0.18)
# Below this |log(q / p)| the mean of p and q is their logarithmic mean to 3e-5, a tenth of what float16 rounds.
SMALL_16 = tl.constexpr(0.02)
# 1.5 * 2^23: added, it rounds to an integer, kept in the low bits.
INTEGER = tl.constexpr(12582912.0)
# An exponential below 2^this is 0.
FLUSH = tl.constexpr(-126.0)


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
def student_exponent(s, point_s, scalars, SWITCHES: tl.constexpr):
    """log2 of the root of exp(s / tau) that the switches name."""
    k = scalars.k / SWITCHES.root
    return tl.fma(s, k, -reference(point_s, k, SWITCHES.exact))


@triton.jit
def student_exponentials(x_s, s, point_s, scalars, SWITCHES: tl.constexpr):
    """exp(s / tau) and exp(s)."""
    u = tl.exp2(x_s)
    e_s = power(u, SWITCHES.root)
    e_1 = power(u, SWITCHES.power) if SWITCHES.power else tl.exp2(hard_exponent(s, point_s, scalars, SWITCHES))
    return e_s, e_1


@triton.jit
def hard_exponent(s, point_s, scalars, SWITCHES: tl.constexpr):
    """log2 of exp(s), from where `student_exponentials` measures it."""
    if SWITCHES.power:
        exponent = SWITCHES.power * student_exponent(s, point_s, scalars, SWITCHES)
    else:
        exponent = tl.fma(s, LOG2E, -reference(point_s, LOG2E, SWITCHES.exact))
    return exponent


@triton.jit
def teacher_exponent(t, point_t, scalars, SWITCHES: tl.constexpr):
    return tl.fma(t, scalars.k_t, -reference(point_t, scalars.k_t, SWITCHES.exact))


@triton.jit
def log2_ratio(x_s, x_t, ROOT: tl.constexpr):
    """delta where the switches do not say exact."""
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
def off_grid(point_s, point_t, scalars, SWITCHES: tl.constexpr):
    """log2 of the exponentials at the points themselves: what references leave over."""
    rest_s = SWITCHES.root * student_exponent(point_s, point_s, scalars, SWITCHES)
    return rest_s, teacher_exponent(point_t, point_t, scalars, SWITCHES)


@triton.jit
def unlagged(lag):
    """2^-lag."""
    x = lag * -LN2
    return tl.fma(x, tl.fma(x, 0.5, 1.0), 1.0)


@triton.jit
def fine_exponential(s, point, scalars):
    """exp((s - point) / tau), up to 2^60, as a power of 2 and less than half of that: each to 1e-8 of their sum and
    without a bias, so that their sum over a vocabulary is right to 1e-8. 1 / tau log2(e) is k + family[0]."""
    down = s - point
    integer = tl.cast(INTEGER, tl.float32)
    shifted = tl.fma(down, scalars.k, integer)
    f = tl.fma(down, scalars.family[0], tl.fma(down, scalars.k, integer - shifted))
    # Least relative error of (2^f - 1) / f, where the first coefficient is ln 2 to 50 bits.
    p = tl.fma(f, tl.fma(f, 1.5096914e-5, 1.5455946e-4), 1.3334254e-3)
    p = tl.fma(f, tl.fma(f, tl.fma(f, p, 9.6180784e-3), 5.5504102e-2), 0.24022651)
    p = tl.fma(f, p, -1.9046542e-9) + 0.69314718
    whole = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    none = down * scalars.k < FLUSH
    return tl.where(none, 0.0, whole), tl.where(none, 0.0, whole * (p * f))
