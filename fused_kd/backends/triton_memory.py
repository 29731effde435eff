"""How rows of logits lie in memory, and their way to the lanes of the Triton kernels and back.

A lane takes VECTOR adjacent columns at a time: 16 bytes of the wider logits. Where rows lie at multiples of that, it
loads them as they are. Others (a vocabulary of 50257, a view that begins at an odd column) have their columns SHIFTED
against the multiples of 16 bytes: a lane loads the two blocks of 16 bytes that its vector touches and takes its part
from their registers. So which columns a lane has, and a row's bits, do not depend on where the row lies.
"""

import triton
import triton.language as tl

# Beside 0 and 1, which half of 16 bytes a row begins in.
UNKNOWN = tl.constexpr(2)


@triton.jit
def row_start(rows, row):
    """Where a row begins. Layout: stride, size, stride, size, ..., stride of the leading dimensions, last first."""
    layout = rows.layout
    start = (row * 0).to(tl.int64)
    for i in tl.static_range(len(layout) // 2):
        start += (row % layout[2 * i + 1]).to(tl.int64) * layout[2 * i]
        row = row // layout[2 * i + 1]
    return rows.data + (start + row.to(tl.int64) * layout[len(layout) - 1])


@triton.jit
def floored(at, BYTES: tl.constexpr):
    """The multiples of so many bytes at which these addresses lie, or before: so that the compiler knows of it."""
    return tl.multiple_of((at.to(tl.uint64) // BYTES * BYTES).to(at.dtype), BYTES)


@triton.jit
def columns_between(a, b):
    """How many columns address b is past a."""
    SIZE: tl.constexpr = a.dtype.element_ty.primitive_bitwidth // 8
    return ((b.to(tl.uint64) - a.to(tl.uint64)) // SIZE).to(tl.int32)


@triton.jit
def half_of(at):
    """Which half of 16 bytes an address lies in."""
    return ((at.to(tl.uint64) // 8) % 2).to(tl.int32)


@triton.jit
def reader(row, LANES: tl.constexpr, VECTOR: tl.constexpr, SHIFTED: tl.constexpr, HALF: tl.constexpr):
    """Where the lanes' vectors lie that `loaded` takes.

    SHIFTED: the 16 bytes that hold a vector's first column; how many columns on lie those that hold its last; how far
    into the first it begins (8 bytes, 4 bytes, bits), and how many columns are left there: the same for each tile.
    HALF: in which one of those 16 bytes a row begins, or UNKNOWN.
    """
    SIZE: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
    if SHIFTED:
        at = row + tl.arange(0, LANES) * VECTOR
        address = at.to(tl.uint64)
        more = ((address + (VECTOR * SIZE - 1)) // 16 - address // 16).to(tl.int32) * (16 // SIZE)
        into = (address % 16).to(tl.uint32)
        left = ((16 - into) // SIZE).to(tl.int32)
        by_8 = (into & 8) != 0 if HALF == UNKNOWN else tl.full([LANES], HALF == 1, tl.int1)
        vectors = (floored(at, 16), more, by_8, (into & 4) != 0, (into & 2) * 8, left)
    else:
        vectors = (floored(row, VECTOR * SIZE) + tl.arange(0, LANES) * VECTOR,)  # type: ignore[assignment]
    return vectors


@triton.jit
def four_words(at, mask, MASKED: tl.constexpr, POLICY: tl.constexpr):
    at = tl.multiple_of(at.to(tl.pointer_type(tl.uint32)), 16)[:, None] + tl.arange(0, 4)[None, :]
    if MASKED:
        words = tl.load(at, mask=mask[:, None], other=0, eviction_policy=POLICY)
    else:
        words = tl.load(at, eviction_policy=POLICY)
    even, odd = tl.split(tl.reshape(words, [at.shape[0], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def funnel(low, high, bits):
    return (((high.to(tl.uint64) << 32) | low) >> bits).to(tl.uint32)


@triton.jit
def beside(a, b):
    """Two tiles [LANES, n] as one [LANES, 2 n], within the lanes: the order of the columns is nobody's business."""
    return tl.reshape(tl.join(a, b), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def halves(words, DTYPE: tl.constexpr):
    """The columns [LANES, 2 n] of 16 bits in words [LANES, n]."""
    if DTYPE == tl.bfloat16:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)
    return beside(low, high)


@triton.jit
def loaded(vectors, start, begin, end, VECTOR: tl.constexpr, EDGE: tl.constexpr, KEPT: tl.constexpr):
    """Columns from `start` on in float32, [LANES, VECTOR]. EDGE: -inf in those before `begin` and from `end` on.

    KEPT in the cache: they will be read again. What a mask leaves out holds no column of the row.
    """
    DTYPE: tl.constexpr = vectors[0].dtype.element_ty
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    POLICY: tl.constexpr = "evict_last" if KEPT else "evict_first"
    LANES: tl.constexpr = vectors[0].shape[0]
    columns = start + tl.arange(0, LANES) * VECTOR
    if len(vectors) > 1:  # SHIFTED
        block, more, by_8, by_4, bits, left = vectors
        first, last = (columns + left > begin) & (columns < end), columns + left < end
        w0, w1, w2, w3 = four_words(block + start, first, EDGE, POLICY)
        w4, w5, w6, w7 = four_words(block + start + more, last, EDGE, POLICY)
        w0, w1, w2 = tl.where(by_8, w2, w0), tl.where(by_8, w3, w1), tl.where(by_8, w4, w2)
        w3, w4, w5 = tl.where(by_8, w5, w3), tl.where(by_8, w6, w4), tl.where(by_8, w7, w5)
        w0, w1, w2 = tl.where(by_4, w1, w0), tl.where(by_4, w2, w1), tl.where(by_4, w3, w2)
        w3, w4 = tl.where(by_4, w4, w3), tl.where(by_4, w5, w4)
        if SIZE == 2:
            w0, w1, w2, w3 = funnel(w0, w1, bits), funnel(w1, w2, bits), funnel(w2, w3, bits), funnel(w3, w4, bits)
        words = tl.join(w0, w1)
        if VECTOR * SIZE == 16:
            words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [LANES, 4])
        x = words.to(tl.float32, bitcast=True) if SIZE == 4 else halves(words, DTYPE)
    else:
        at = (vectors[0] + start)[:, None] + tl.arange(0, VECTOR)[None, :]
        if EDGE:
            some = (columns + VECTOR > begin) & (columns < end)
            x = tl.load(at, mask=some[:, None], other=-float("inf"), eviction_policy=POLICY)
        else:
            x = tl.load(at, eviction_policy=POLICY)
        if DTYPE == tl.bfloat16:
            x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        else:
            x = x.to(tl.float32)
    if EDGE:
        columns = columns[:, None] + tl.arange(0, VECTOR)[None, :]
        x = tl.where((columns >= begin) & (columns < end), x, -float("inf"))
    return x


@triton.jit
def tile_columns(start, GROUPS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The columns of a tile, laid out as `tile_of` lays out the logits."""
    columns = start + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    if GROUPS > 1:
        columns = beside(columns, LANES * VECTOR + columns)
    if GROUPS > 2:
        columns = beside(columns, 2 * LANES * VECTOR + columns)
    tl.static_assert(GROUPS <= 4 and GROUPS != 3)
    return columns


@triton.jit
def tile_of(vectors, start, end, GROUPS: tl.constexpr, VECTOR: tl.constexpr, EDGE: tl.constexpr, KEPT: tl.constexpr):
    """A tile [LANES, GROUPS * VECTOR] of the columns from 0 on."""
    GROUP: tl.constexpr = vectors[0].shape[0] * VECTOR
    x = loaded(vectors, start, 0, end, VECTOR, EDGE, KEPT)
    if GROUPS > 1:
        x = beside(x, loaded(vectors, start + GROUP, 0, end, VECTOR, EDGE, KEPT))
    if GROUPS > 2:
        y = loaded(vectors, start + 2 * GROUP, 0, end, VECTOR, EDGE, KEPT)
        z = loaded(vectors, start + 3 * GROUP, 0, end, VECTOR, EDGE, KEPT)
        x = beside(x, beside(y, z))
    return x


@triton.jit
def fill(row, begin, end, value, TILE: tl.constexpr):
    """Writes the value into columns `begin` to `end`."""
    aligned = floored(row + begin, 16)
    ahead = columns_between(aligned, row + begin)
    length = end - begin + ahead
    filled = (tl.zeros([TILE], tl.float32) + value).to(row.dtype.element_ty)
    for start in range(0, length, TILE):
        columns = start + tl.arange(0, TILE)
        if (start >= ahead) & (start + TILE <= length):
            tl.store(aligned + columns, filled)
        else:
            tl.store(aligned + columns, filled, mask=(columns >= ahead) & (columns < length))
