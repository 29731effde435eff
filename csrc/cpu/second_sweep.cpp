// Plain loops over a block of a row whose sums are finished: the families' terms, and every gradient that is not q - p.
#include "lanes.h"

namespace fused_kd {
namespace {

// The columns of a block, in turn: step(s, t) with kLanes of their logits.
template <class Step>
FKD_MATH void by_lanes(const float* s, const float* t, int n, const Ahead& ahead, const Step& step) {
    int j = 0;
    for (; j + kLanes <= n; j += kLanes) {
        fetch<2>(ahead, j);
        step(s + j, t + j);
    }
    if (j < n) step(Tail<Float32, kLanes>::of(s + j, n - j).x, Tail<Float32, kLanes>::of(t + j, n - j).x);
}

template <class Family>
FKD_CLONES TermSums<float> sums_of(const float* s, const float* t, int n, GradientScales r, Scales k, FamilyNumbers f,
                                    Ahead ahead) {
    float v[kLanes] = {}, c[kLanes] = {}, rest_c[kLanes] = {}, rest_q[kLanes] = {};
    const auto step = [&](const float* __restrict x, const float* __restrict w) FKD_INLINED {
        FKD_SIMD
        for (int l = 0; l < kLanes; ++l) {
            const float d = r.centre.difference(x[l], w[l]) * k.unit - r.row.log_ratio;
            const float x_s = (x[l] - r.centre.student) * k.log2, x_t = (w[l] - r.centre.teacher) * k.log2;
            const Terms part = Family::terms(f, r.row.sums, x_s, x_t, d);
            const float rest = part.q <= 0.5f ? 1.0f : 0.0f;  // (With two choices GCC 12 makes a branch.)
            v[l] += part.v;
            c[l] += part.c;
            rest_c[l] += rest * part.c;
            rest_q[l] += rest * part.q;
        }
    };
    by_lanes(s, t, n, ahead, step);
    TermSums<float> sums;
    sums.v = total(v);
    sums.c = total(c);
    sums.rest_c = total(rest_c);
    sums.rest_q = total(rest_q);
    return sums;
}

template <class Kind, Hard hard>
FKD_CLONES void gradient_of(const float* s, const float* t, int n, GradientScales r, Scales k, FamilyNumbers f, float* g,
                            Ahead ahead) {
    const auto step = [&](const float* x, const float* w, float* out) FKD_INLINED {  // (out may be x)
        FKD_SIMD
        for (int l = 0; l < kLanes; ++l) {
            const float x_s = (x[l] - r.centre.student) * k.log2, x_t = (w[l] - r.centre.teacher) * k.log2;
            const float delta = r.centre.difference(x[l], w[l]) * k.unit;
            const Slope slope = SlopeOf<Kind>::at(x_s, x_t, delta, (x[l] - w[l]) * k.unit, r.row, f);
            float y = r.constant + r.soft * slope.soft;
            if (hard != Hard::off) y += r.hard * hard_exponential<hard>(slope.q * r.row.sums.z_s, x[l], r.centre.student);
            out[l] = y;
        }
    };
    int j = 0;
    for (; j + kLanes <= n; j += kLanes) {
        fetch<2>(ahead, j);
        step(s + j, t + j, g + j);
    }
    if (j < n) {
        float out[kLanes];
        step(Tail<Float32, kLanes>::of(s + j, n - j).x, Tail<Float32, kLanes>::of(t + j, n - j).x, out);
        std::memcpy(g + j, out, sizeof(*g) * static_cast<size_t>(n - j));
    }
}

FKD_CLONES Moments<float> moments_of(const float* s, const float* t, int n, float unit, Ahead ahead) {
    float sum[kLanes] = {}, count[kLanes] = {}, squares[kLanes] = {};
    const auto add = [&](const float* __restrict x, const float* __restrict w) FKD_INLINED {
        FKD_SIMD
        for (int l = 0; l < kLanes; ++l) {
            const bool counts = (x[l] != -INFINITY) & (w[l] != -INFINITY);
            sum[l] += counts ? (x[l] - w[l]) * unit : 0.0f;
            count[l] += static_cast<float>(counts);
        }
    };
    by_lanes(s, t, n, ahead, add);
    Moments<float> m;
    m.count = total(count);
    if (m.count == 0) return m;
    const float mean = m.mean = total(sum) / m.count;
    const auto square = [&](const float* __restrict x, const float* __restrict w) FKD_INLINED {
        FKD_SIMD
        for (int l = 0; l < kLanes; ++l) {
            const bool counts = (x[l] != -INFINITY) & (w[l] != -INFINITY);
            const float apart = (x[l] - w[l]) * unit - mean;
            squares[l] += counts ? apart * apart : 0.0f;
        }
    };
    by_lanes(s, t, n, ahead, square);
    m.squares = total(squares);
    return m;
}

template <class Call>
auto with_family(int64_t divergence, bool far, const Call& call) {
    switch (divergence) {
        case FKD_MIXTURE: return far ? call(FarMixture<false>()) : call(Mixture<false>());
        case FKD_SKEWED_MIXTURE: return far ? call(FarMixture<true>()) : call(Mixture<true>());
        case FKD_ALPHA_BETA: return call(AlphaBeta());
        case FKD_VARIATION: return call(Variation());
        default: return call(Linear());
    }
}

}  // namespace

TermSums<float> block_term_sums(int64_t divergence, const float* s, const float* t, int n, const GradientScales& r,
                                const Scales& k, const FamilyNumbers& f, const Ahead& ahead) {
    const auto sums = [&](auto family) { return sums_of<decltype(family)>(s, t, n, r, k, f, ahead); };
    return with_family(divergence, r.far, sums);
}

Moments<float> block_moments(const float* s, const float* t, int n, const Scales& k, const Ahead& ahead) {
    return moments_of(s, t, n, k.unit, ahead);
}

void block_other_gradient(int64_t divergence, Hard hard, const float* s, const float* t, int n, const GradientScales& r,
                          const Scales& k, const FamilyNumbers& f, float* g, const Ahead& ahead) {
    with_hard(hard, [&](auto h) {
        const auto run = [&](auto kind) { gradient_of<decltype(kind), h.value>(s, t, n, r, k, f, g, ahead); };
        if (divergence == FKD_REVERSE_KL) return run(ReverseKL());
        if (divergence == FKD_LOGIT_MSE) return run(LogitMSE());
        with_family(divergence, r.far, run);
    });
}

}  // namespace fused_kd
