// How logits are stored: their dtypes, where a row lies, and whether it is read. For every native backend.
#pragma once
#include <cstdint>
#include <cstring>

#include "fused_kd.h"
#include "row_math.h"

namespace fused_kd {

FKD_MATH float of_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

FKD_MATH uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

// dtypes: the way of their bits into float32, and back to nearest even.
struct Float32 {
    using Bits = float;
    static constexpr float kMinusInf = -INFINITY;
    FKD_MATH float widened(float x) { return x; }
    FKD_MATH float narrowed(float x) { return x; }
};

struct Bfloat16 {
    using Bits = uint16_t;
    static constexpr uint16_t kMinusInf = 0xff80;
    FKD_MATH float widened(uint16_t x) { return of_bits(static_cast<uint32_t>(x) << 16); }
    FKD_MATH uint16_t narrowed(float x) {
        const uint32_t bits = bits_of(x);
        const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        return static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
    }
};

struct Float16 {
    using Bits = uint16_t;
    static constexpr uint16_t kMinusInf = 0xfc00;
    // The exponents' biases differ by 112: a product moves them and makes subnormal numbers normal.
    FKD_MATH float widened(uint16_t x) {
        const uint32_t magnitude = x & 0x7fffu, sign = static_cast<uint32_t>(x & 0x8000u) << 16;
        const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
        return of_bits(bits_of(of_bits(magnitude << 13) * 0x1p112f) | special | sign);
    }
    FKD_MATH uint16_t narrowed(float x) {
        const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
        const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        // Adding 1/2 puts a subnormal's last bit at float32's last bit, and the addition rounds it.
        const uint32_t subnormal = bits_of(of_bits(magnitude) + 0.5f) - bits_of(0.5f);
        const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
        const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
        return static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? large : finite));
    }
};

FKD_MATH int64_t element_size(const FkdRows& a) { return a.dtype == FKD_FLOAT32 ? 4 : a.dtype == FKD_INT64 ? 8 : 2; }

FKD_MATH int64_t row_count(const FkdRows& a) {
    int64_t n = 1;
    for (int64_t d = 0; d < a.dims; ++d) n *= a.sizes[d];
    return n;
}

// Where a row starts, in elements.
FKD_MATH int64_t row_offset(const FkdRows& a, int64_t row) {
    int64_t offset = 0;
    for (int64_t d = a.dims - 1; d > 0; --d) {
        offset += row % a.sizes[d] * a.strides[d];
        row /= a.sizes[d];
    }
    return a.dims > 0 ? offset + row * a.strides[0] : offset;
}

// Whether a row has a term. If not it is skipped, or its label is out of range.
FKD_MATH bool readable(int64_t target, int64_t columns) {
    return target == FKD_NO_LABEL || (target >= 0 && target < columns);
}

}  // namespace fused_kd
