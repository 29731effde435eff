"""The gradient of a column for the Triton kernels, from the stats that `triton_math.py` makes of a row."""

from typing import NamedTuple

import triton
import triton.language as tl

from fused_kd.backends.triton_exponents import (
    LN2,
    LOG2E,
    SMALL,
    SMALL_16,
    between,
    difference,
    hard_exponent,
    log2_ratio,
    off_grid,
    phi_over_square,
    student_exponent,
    student_exponentials,
    teacher_exponent,
)
from fused_kd.backends.triton_families import measured, slope


class Coefficients(NamedTuple):
    """Of gradient = by_t (ratio e_s - e_t) + by_1 e_1 + constant; at the label, at_label in the place of by_1 e_1."""

    point_s: tl.tensor
    point_t: tl.tensor
    apart: tl.tensor
    then: tl.tensor
    by_t: tl.tensor
    ratio: tl.tensor
    log_ratio: tl.tensor
    by_1: tl.tensor
    constant: tl.tensor
    at_label: tl.tensor
    # Of every other divergence, in the place of by_t, ratio, log_ratio: what `slope` takes, and a factor on it.
    at: tuple[tl.tensor, ...]
    growth: tl.tensor
    top: tl.tensor
    by_slope: tl.tensor


@triton.jit
def gradient_coefficients(stats, target, coef_soft, coef_hard, vocabulary, scalars, SWITCHES: tl.constexpr):
    point_s, point_t, student_sum, teacher_sum, log_ratio, hard_sum, miss, growth, top = stats
    by_t, ratio, apart, then = 0.0, 0.0, 0.0, 0.0
    at, by_slope = (), coef_soft * scalars.unit
    if SWITCHES.family == "rest":
        at = (point_t,)  # type: ignore[assignment]
        by_slope = tl.where(student_sum == 0, 0.0, by_slope / student_sum)
    elif SWITCHES.family == "reverse_kl":
        at = measured(stats, scalars, SWITCHES)
        by_slope = tl.where(top == top, by_slope, float("nan"))  # (`slope` hides NaN.)
    elif SWITCHES.family != "":
        if SWITCHES.soft:
            row = measured(stats, scalars, SWITCHES)
            at, by_slope, growth, top = row, by_slope * row.scale, growth / row.scale, top / row.scale
    elif SWITCHES.soft:
        rest_s, rest_t = off_grid(point_s, point_t, scalars, SWITCHES)
        by_t = coef_soft * scalars.unit / (teacher_sum * tl.exp2(rest_t))
        ratio = teacher_sum / student_sum * tl.exp2(rest_t - rest_s)
        log_ratio *= LOG2E
        if SWITCHES.exact:
            apart, then = between(point_s, point_t)
        else:
            log_ratio += rest_s - rest_t
    by_1, constant, at_label = 0.0, 0.0, 0.0
    if SWITCHES.hard:
        if target >= 0:
            by_1 = coef_hard / (hard_sum * tl.exp2(hard_exponent(point_s, point_s, scalars, SWITCHES)))
            # softmax(s)[label] - 1 would lose what a sure student has left to learn.
            at_label = -coef_hard * miss
            if SWITCHES.smoothed:
                constant = -coef_hard * scalars.smoothing / vocabulary
                at_label += coef_hard * scalars.smoothing + constant
    return Coefficients(
        point_s, point_t, apart, then, by_t, ratio, log_ratio, by_1, constant, at_label, at, growth, top, by_slope
    )


@triton.jit
def gradient(
    s, t, columns, label, coefficients, scalars, SWITCHES: tl.constexpr, FINE: tl.constexpr, EDGE: tl.constexpr
):
    """FINE: for a gradient in float32."""
    point_s, point_t, apart, then, by_t, ratio, log_ratio, by_1, constant, at_label, at, growth, top, by_slope = (
        coefficients
    )
    x_s = student_exponent(s, point_s, scalars, SWITCHES)
    e_s, e_1 = student_exponentials(x_s, s, point_s, scalars, SWITCHES)
    g = tl.zeros_like(s)
    if SWITCHES.hard:
        g = tl.fma(by_1, e_1, constant) if SWITCHES.smoothed else by_1 * e_1
        if EDGE:
            g = tl.where(columns == label, at_label, g)
    if SWITCHES.family != "":
        g = tl.fma(slope(s, t, at, growth, top, scalars, SWITCHES), by_slope, g)
    elif SWITCHES.soft:
        x_t = teacher_exponent(t, point_t, scalars, SWITCHES)
        e_t = tl.exp2(x_t)
        # Where log2(q / p) is small, the difference of p and q has lost its digits.
        exact = difference(s, t, apart, then)
        if FINE:
            if SWITCHES.exact:
                d = tl.fma(exact, scalars.k, -log_ratio)
            else:
                d = log2_ratio(x_s, x_t, SWITCHES.root) - log_ratio
            near = (e_t * d) * tl.fma(d, phi_over_square(d, 4), LN2)
            close = tl.abs(d) < SMALL
        else:
            # q - p is log(q / p) times the logarithmic mean of p and q, and that is almost their mean.
            half = tl.fma(log2_ratio(x_s, x_t, SWITCHES.root), LN2 / 2, log_ratio * (-LN2 / 2))
            near = half * tl.fma(ratio, e_s, e_t)
            close = tl.abs(half) < SMALL_16 / 2
        g = tl.fma(tl.where(close, near, tl.fma(ratio, e_s, -e_t)), by_t, g)
    return g
