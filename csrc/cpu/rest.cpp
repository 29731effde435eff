// Plain loops over a block of the student's logits alone: the sum over the columns that a sparse teacher does not list,
// and its gradient.
#include "lanes.h"

namespace fused_kd {
namespace {

// 2^x for x <= 60, within 2e-7 at one column as exp2_of, but without a bias: the sum over a vocabulary is right to 1e-9.
FKD_MATH float unbiased_exp2(float x) {
    constexpr float magic = 12582912.0f;
    const float shifted = x + magic, f = x - (shifted - magic);
    float p = 1.5096914e-5f;  // least relative error of (2^f - 1) / f, where the first coefficient is ln 2 to 50 bits
    p = p * f + 1.5455946e-4f;
    p = p * f + 1.3334254e-3f;
    p = p * f + 9.6180784e-3f;
    p = p * f + 5.5504102e-2f;
    p = p * f + 0.24022651f;
    p = (p * f - 1.9046542e-9f) + 0.69314718f;
    const uint32_t bits = bits_of(p * f + 1.0f) + (bits_of(shifted) << 23);
    return of_bits(bits & (0u - static_cast<uint32_t>(x >= kFlush)));
}

template <Hard hard>
FKD_CLONES RestSums sums_of(const float* s, int n, float from, RestScale k) {
    double z[kLanes] = {};
    float z_1[kLanes] = {};
    const auto step = [&](const float* __restrict x) FKD_INLINED {
        FKD_SIMD
        for (int l = 0; l < kLanes; ++l) {
            const float down = x[l] - from;
            const float e = unbiased_exp2(down * k.high + down * k.low);
            z[l] += static_cast<double>(e);
            if (hard == Hard::same || hard == Hard::square) z_1[l] += hard_exponential<hard>(e, 0, 0);
        }
    };
    int j = 0;
    for (; j + kLanes <= n; j += kLanes) step(s + j);
    if (j < n) step(Tail<Float32, kLanes>::of(s + j, n - j).x);
    double all = 0;
    for (int l = 0; l < kLanes; ++l) all += z[l];
    return {all, total(z_1)};
}

template <Hard hard>
FKD_CLONES void gradient_of(const float* s, int n, RestGradient r, float* g) {
    FKD_SIMD
    for (int j = 0; j < n; ++j) {
        const float e = exp2_of((s[j] - r.from) * r.log2);
        float y = e * r.by + r.constant;
        if (hard != Hard::off) y += r.by_1 * hard_exponential<hard>(e, s[j], r.student_max);
        g[j] = y;
    }
}

}  // namespace

RestSums block_rest_sums(Hard hard, const float* s, int n, float from, const RestScale& k) {
    return with_hard(hard, [&](auto h) { return sums_of<h.value>(s, n, from, k); });
}

void block_rest_gradient(Hard hard, const float* s, int n, const RestGradient& r, float* g) {
    with_hard(hard, [&](auto h) { gradient_of<h.value>(s, n, r, g); });
}

}  // namespace fused_kd
