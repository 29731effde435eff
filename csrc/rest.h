// The exponential for FKD_REST, whose sums have to be right to more than float32 holds. For every native backend.
#pragma once
#include "storage.h"

namespace fused_kd {

// 1 / tau times log2(e), in two parts.
struct RestScale {
    float high, low;

    static RestScale of(double temperature) {
        const float high = static_cast<float>(kLog2E / temperature);
        return {high, static_cast<float>(kLog2E / temperature - high)};
    }
};

// exp((s - from) / tau), up to 2^60, as whole + part with |part| < whole / 2: each to 1e-8 of their sum and without a
// bias, so that the sum over a vocabulary is right to 1e-8. NaN makes a part of NaN.
struct Exponential {
    float whole, part;
};
FKD_MATH Exponential fine_exponential(float s, float from, const RestScale& k) {
    constexpr float magic = 12582912.0f;
    const float down = s - from, x = down * k.high, shifted = x + magic;
    const float f = (down * k.high - (shifted - magic)) + down * k.low;
    float p = 1.5096914e-5f;  // least relative error of (2^f - 1) / f, where the first coefficient is ln 2 to 50 bits
    p = p * f + 1.5455946e-4f;
    p = p * f + 1.3334254e-3f;
    p = p * f + 9.6180784e-3f;
    p = p * f + 5.5504102e-2f;
    p = p * f + 0.24022651f;
    p = (p * f - 1.9046542e-9f) + 0.69314718f;
    const float whole = of_bits(bits_of(1.0f) + (bits_of(shifted) << 23));
    const uint32_t counts = 0u - static_cast<uint32_t>(!(x < kFlush));
    return {of_bits(bits_of(whole) & counts), of_bits(bits_of(whole * (p * f)) & counts)};
}

}  // namespace fused_kd
