// Plain loops, vectorised by the compiler, once per instruction set (target_clones picks at load time).
#include "blocks.h"

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(FKD_NO_CLONES)
#define FKD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FKD_CLONES
#endif
#define FKD_SIMD _Pragma("omp simd")
#define FKD_SIMD_SUM(...) _Pragma(FKD_STRING(omp simd reduction(+ : __VA_ARGS__)))
#define FKD_STRING(x) #x

namespace fused_kd {
namespace {

template <Hard hard, bool keep>
FKD_CLONES BlockSums sums_of(const float* __restrict s, const float* __restrict t, int n, Centre m, Scales k,
                             float* __restrict excess, float* __restrict e_t, float* __restrict e_1) {
    float z_s = 0, z_t = 0, b1 = 0, b2 = 0, z_1 = 0;
    FKD_SIMD_SUM(z_s, z_t, b1, b2, z_1)
    for (int j = 0; j < n; ++j) {
        const Pair pair = exponentials(s[j], t[j], m, k);
        const Share part = share(pair.e_s, pair.e_t, pair.delta);
        z_s += pair.e_s;
        z_t += pair.e_t;
        b1 += part.b1;
        b2 += part.b2;
        if (hard != Hard::off) {
            const float e = hard_exponential<hard>(pair.e_s, s[j], m.student);
            z_1 += e;
            if (keep && hard == Hard::exponential) e_1[j] = e;
        }
        if (keep) {
            excess[j] = part.excess;
            e_t[j] = pair.e_t;
        }
    }
    return {z_s, z_t, b1, b2, z_1};
}

template <Hard hard>
FKD_CLONES void gradient_of(const float* __restrict s, const float* __restrict t, int n, GradientScales r, Scales k,
                            float* g) {
    const float by_e_s = r.soft * r.per_z_s, by_e_t = r.soft * r.per_z_t;
    FKD_SIMD
    for (int j = 0; j < n; ++j) {
        const Pair pair = exponentials(s[j], t[j], r.max, k);
        float y = probability_difference(pair.e_s * by_e_s, pair.e_t * by_e_t, pair.delta - r.log_ratio) + r.constant;
        if (hard != Hard::off) y += r.hard * hard_exponential<hard>(pair.e_s, s[j], r.max.student);
        g[j] = y;
    }
}

template <Hard hard>
FKD_CLONES void gradient_of_kept(const float* __restrict excess, const float* __restrict e_t,
                                 const float* __restrict e_1, int n, KeptFactors f, float* __restrict g) {
    FKD_SIMD
    for (int j = 0; j < n; ++j) {
        float y = excess[j] * f.by_excess + (e_t[j] * f.by_e_t + f.constant);
        if (hard == Hard::exponential) y += e_1[j] * f.by_e_1;
        if (hard == Hard::same) y += (excess[j] + e_t[j]) * f.by_e_1;
        if (hard == Hard::square) y += (excess[j] + e_t[j]) * (excess[j] + e_t[j]) * f.by_e_1;
        g[j] = y;
    }
}

template <bool keep>
FKD_CLONES float hard_sum_of(const float* __restrict s, int n, float student_max, float* __restrict e_1) {
    float z_1 = 0;
    FKD_SIMD_SUM(z_1)
    for (int j = 0; j < n; ++j) {
        const float e = hard_exponential<Hard::exponential>(0, s[j], student_max);
        z_1 += e;
        if (keep) e_1[j] = e;
    }
    return z_1;
}

float of_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

}  // namespace

BlockSums block_sums(Hard hard, const float* s, const float* t, int n, Centre m, const Scales& k, const Kept* kept) {
    switch (hard) {
#define FKD_CASE(H)                                                                                    \
    case H:                                                                                            \
        return kept ? sums_of<H, true>(s, t, n, m, k, kept->excess, kept->e_t, kept->e_1)              \
                    : sums_of<H, false>(s, t, n, m, k, nullptr, nullptr, nullptr);
        FKD_CASE(Hard::off) FKD_CASE(Hard::same) FKD_CASE(Hard::square) FKD_CASE(Hard::exponential)
#undef FKD_CASE
    }
    return {};
}

void block_gradient(Hard hard, const float* s, const float* t, int n, const GradientScales& r, const Scales& k, float* g) {
    switch (hard) {
        case Hard::off: return gradient_of<Hard::off>(s, t, n, r, k, g);
        case Hard::same: return gradient_of<Hard::same>(s, t, n, r, k, g);
        case Hard::square: return gradient_of<Hard::square>(s, t, n, r, k, g);
        case Hard::exponential: return gradient_of<Hard::exponential>(s, t, n, r, k, g);
    }
}

void block_gradient_of_kept(Hard hard, const Kept& kept, int n, const KeptFactors& f, float* g) {
    switch (hard) {
        case Hard::off: return gradient_of_kept<Hard::off>(kept.excess, kept.e_t, kept.e_1, n, f, g);
        case Hard::same: return gradient_of_kept<Hard::same>(kept.excess, kept.e_t, kept.e_1, n, f, g);
        case Hard::square: return gradient_of_kept<Hard::square>(kept.excess, kept.e_t, kept.e_1, n, f, g);
        case Hard::exponential: return gradient_of_kept<Hard::exponential>(kept.excess, kept.e_t, kept.e_1, n, f, g);
    }
}

float block_hard_sum(const float* s, int n, float student_max, float* e_1) {
    return e_1 ? hard_sum_of<true>(s, n, student_max, e_1) : hard_sum_of<false>(s, n, student_max, e_1);
}

FKD_CLONES void block_hard_gradient(const float* __restrict s, int n, const GradientScales& r, float* g) {
    FKD_SIMD
    for (int j = 0; j < n; ++j)
        g[j] = r.hard * hard_exponential<Hard::exponential>(0, s[j], r.max.student) + r.constant;
}

FKD_CLONES void block_hard_gradient_of_kept(const Kept& kept, int n, const KeptFactors& f, float* __restrict g) {
    const float* __restrict e_1 = kept.e_1;
    FKD_SIMD
    for (int j = 0; j < n; ++j) g[j] = e_1[j] * f.by_e_1 + f.constant;
}

FKD_CLONES float block_maximum(const float* x, int n) {
    float m = kLowest;
    int nan = 0;
    _Pragma("omp simd reduction(max : m) reduction(| : nan)") for (int j = 0; j < n; ++j) {
        m = m < x[j] ? x[j] : m;
        nan |= x[j] != x[j];
    }
    return nan ? NAN : m;
}

FKD_CLONES float block_sum(const float* x, int n) {
    float sum = 0;
    FKD_SIMD_SUM(sum)
    for (int j = 0; j < n; ++j) sum += x[j];
    return sum;
}

FKD_CLONES void block_scale(const float* x, int n, float factor, float* out) {
    FKD_SIMD
    for (int j = 0; j < n; ++j) out[j] = x[j] * factor;
}

FKD_CLONES float block_entropy_sum(const float* t, int n, float teacher_max, const Scales& k) {
    const float scale = k.log2;
    float h = 0;
    FKD_SIMD_SUM(h)
    for (int j = 0; j < n; ++j) {
        const float x = (t[j] - teacher_max) * scale, e_t = exp2_of(x);
        h += e_t > 0 ? e_t * x : 0.0f;
    }
    return h;
}

FKD_CLONES void widen_bfloat16(const uint16_t* __restrict x, int n, float* __restrict out) {
    FKD_SIMD
    for (int j = 0; j < n; ++j) out[j] = of_bits(static_cast<uint32_t>(x[j]) << 16);
}

// The exponents' biases differ by 112: a product moves them and makes subnormal numbers normal.
FKD_CLONES void widen_float16(const uint16_t* __restrict x, int n, float* __restrict out) {
    FKD_SIMD
    for (int j = 0; j < n; ++j) {
        const uint32_t magnitude = x[j] & 0x7fffu, sign = static_cast<uint32_t>(x[j] & 0x8000u) << 16;
        const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
        out[j] = of_bits(bits_of(of_bits(magnitude << 13) * 0x1p112f) | special | sign);
    }
}

FKD_CLONES void narrow_bfloat16(const float* __restrict x, int n, uint16_t* __restrict out) {
    FKD_SIMD
    for (int j = 0; j < n; ++j) {
        const uint32_t bits = bits_of(x[j]);
        const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        out[j] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    }
}

FKD_CLONES void narrow_float16(const float* __restrict x, int n, uint16_t* __restrict out) {
    FKD_SIMD
    for (int j = 0; j < n; ++j) {
        const uint32_t bits = bits_of(x[j]), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
        const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        // Adding 1/2 puts a subnormal's last bit at float32's last bit, and the addition rounds it.
        const uint32_t subnormal = bits_of(of_bits(magnitude) + 0.5f) - bits_of(0.5f);
        const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
        const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
        out[j] = static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? large : finite));
    }
}

}  // namespace fused_kd
