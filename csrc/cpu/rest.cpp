// Plain loops over a block of the student's logits alone: the sum over the columns that a sparse teacher does not list,
// and its gradient.
#include <algorithm>

#include "lanes.h"

namespace fused_kd {
namespace {

// So many columns are summed up in float32, a lane by itself.
constexpr int kRun = 512;

template <Hard hard>
FKD_CLONES RestSums sums_of(const float* __restrict s, int n, float from, RestScale k, Ahead ahead) {
    double z[kLanes] = {};
    float z_1[kLanes] = {}, whole[kLanes], part[kLanes];
    const auto step = [&](const float* __restrict x) FKD_INLINED {
        FKD_SIMD
        for (int l = 0; l < kLanes; ++l) {
            const Exponential e = fine_exponential(x[l], from, k);
            whole[l] += e.whole;
            part[l] += e.part;
            if (hard == Hard::same || hard == Hard::square) z_1[l] += hard_exponential<hard>(e.whole + e.part, 0, 0);
        }
    };
    for (int j = 0; j < n;) {
        const int end = std::min(j + kRun, n);
        for (int l = 0; l < kLanes; ++l) whole[l] = part[l] = 0;
        for (; j + kLanes <= end; j += kLanes) {
            fetch<1>(ahead, j);
            step(s + j);
        }
        if (j < end) step(Tail<Float32, kLanes>::of(s + j, end - j).x);
        j = end;
        FKD_SIMD
        for (int l = 0; l < kLanes; ++l) z[l] += static_cast<double>(whole[l]) + static_cast<double>(part[l]);
    }
    return {joined<kLanes>(z, [](double a, double b) { return a + b; }), total(z_1)};
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

RestSums block_rest_sums(Hard hard, const float* s, int n, float from, const RestScale& k, const Ahead& ahead) {
    return with_hard(hard, [&](auto h) { return sums_of<h.value>(s, n, from, k, ahead); });
}

void block_rest_gradient(Hard hard, const float* s, int n, const RestGradient& r, float* g) {
    with_hard(hard, [&](auto h) { gradient_of<h.value>(s, n, r, g); });
}

}  // namespace fused_kd
