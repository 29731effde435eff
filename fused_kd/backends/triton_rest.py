"""REST of `fused_kd.backends.rows` for the Triton kernels: the sum over the columns that a sparse teacher leaves out.

It has to be right to more than float32 holds: exponentials are in two parts, and lanes add them up in float64. A lane
measures from its own maximum, as in `triton_math.py`.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fused_kd.backends.triton_exponents import LN2, fine_exponential
from fused_kd.backends.triton_memory import UNKNOWN, reader, tile_columns, tile_of

LOWEST = tl.constexpr(-3.4028234663852886e38)
# How many ids are looked at together.
TOGETHER = tl.constexpr(64)


class RestSums(NamedTuple):
    """Of a lane's columns, a section's or the row's. As many numbers as `Sums` of `triton_families.py` has."""

    point: tl.tensor  # their maximum
    high: tl.tensor  # sum exp((s - point) / tau), and what rounding took off
    low: tl.tensor
    unused: tl.tensor


@triton.jit
def no_rest(zero):
    return RestSums(zero + LOWEST, zero, zero, zero)


@triton.jit
def in_double(high, low):
    return high.to(tl.float64) + low.to(tl.float64)


@triton.jit
def in_two(z):
    high = z.to(tl.float32)
    return high, (z - high.to(tl.float64)).to(tl.float32)


@triton.jit
def merged_rest(sums, scalars):
    """One of many."""
    point = tl.max(sums.point, 0)
    down = in_double(*fine_exponential(sums.point, point, scalars))
    high, low = in_two(tl.sum(in_double(sums.high, sums.low) * down, 0))
    return RestSums(point, high, low, high * 0.0)


@triton.jit
def listed_before(ids, number, column):
    """How many of the ids lie before the column."""
    before = column * 0
    for i in range(0, number, TOGETHER):
        at = i + tl.arange(0, TOGETHER)
        id = tl.load(ids + at, mask=at < number, other=2**31 - 1)
        before += tl.sum((id < column).to(tl.int32), 0)
    return before


@triton.jit
def with_rest_tile(
    z, point, position, vectors, start, within, row, scalars, LAUNCH: tl.constexpr, EDGE: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    """The lanes' sums with the tile from column `start` on. The next id is the one at `position`."""
    TILE: tl.constexpr = LAUNCH.groups * LAUNCH.lanes * LAUNCH.vector
    s = tile_of(vectors, start, row.vocabulary, LAUNCH.groups, LAUNCH.vector, EDGE, KEPT)
    id = tl.load(row.teacher + position)
    while id < start + TILE:
        s = tl.where(start + within == id, -float("inf"), s)
        position += 1
        id = tl.load(row.teacher + position)
    top = tl.maximum(point, tl.max(s, 1))
    z *= in_double(*fine_exponential(point, top, scalars))
    whole, part = fine_exponential(s, top[:, None], scalars)
    return z + in_double(tl.sum(whole, 1), tl.sum(part, 1)), top, position


@triton.jit
def section_rest(row, section, scalars, LAUNCH: tl.constexpr, KEPT: tl.constexpr):
    """What one section of a row comes to. `row.teacher`: the ids, ascending, and one behind them that ends them."""
    LANES: tl.constexpr = LAUNCH.lanes
    TILE: tl.constexpr = LAUNCH.groups * LANES * LAUNCH.vector
    first = section * LAUNCH.section
    end = tl.where(section == row.sections - 1, row.vocabulary, first + LAUNCH.section)
    whole = first + (end - first) // TILE * TILE
    vectors = reader(row.student, LANES, LAUNCH.vector, LAUNCH.shifted, UNKNOWN)
    within = tile_columns(0, LAUNCH.groups, LANES, LAUNCH.vector)
    position = listed_before(row.teacher, row.teacher_stride, first)
    z, point = tl.zeros([LANES], tl.float64), tl.full([LANES], LOWEST, tl.float32)
    for start in range(first, whole, TILE):
        z, point, position = with_rest_tile(
            z, point, position, vectors, start, within, row, scalars, LAUNCH, False, KEPT
        )
    for start in range(whole, end, TILE):
        z, point, position = with_rest_tile(
            z, point, position, vectors, start, within, row, scalars, LAUNCH, True, KEPT
        )
    high, low = in_two(z)
    return merged_rest(RestSums(point, high, low, high * 0.0), scalars)


@triton.jit
def log_rest(sums, scalars):
    return sums.point * scalars.unit + tl.log2(sums.high) * LN2


@triton.jit
def rest_slope(s, point, scalars):
    """The gradient of log R in a column, times tau and R."""
    return tl.exp2((s - point) * scalars.k)
