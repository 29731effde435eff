// Plain loops over a block of a row.
#include "blocks.h"

#include <algorithm>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "lanes.h"

namespace fused_kd {
namespace {

// Where the teacher is sure, so many columns are summed by themselves: else the lane that holds all of p would round away
// what follows it there.
constexpr int kRun = 512;
// So many columns before they are read, memory is asked for the logits of a gradient.
constexpr int kAhead = 512;

// Four floats at a time, to addresses that are multiples of 16. They reach memory by the next fence.
FKD_MATH void store_past_caches(const float (&x)[kLanes], float* to) {
#if defined(__SSE__)
    for (int l = 0; l < kLanes; l += 4) _mm_stream_ps(to + l, _mm_load_ps(x + l));
#else
    std::memcpy(to, x, sizeof(x));
#endif
}

// The columns from j to `end`.
template <Hard hard, bool exchanged, Distance distance, bool keep>
FKD_CLONES BlockSums sums_of(const float* __restrict s, const float* __restrict t, int j, int end, Centre m, Scales k,
                             float* __restrict excess, float* __restrict e_t, float* __restrict e_1, Ahead ahead) {
    float z_s[kLanes] = {}, z_t[kLanes] = {}, b1[kLanes] = {}, b2[kLanes] = {}, apart[kLanes] = {}, z_1[kLanes] = {};
    const auto step = [&](const float* __restrict x, const float* __restrict w, int j) FKD_INLINED {
        fetch<keep ? kStreams : 2>(ahead, j);  // without `keep` the logits alone
        FKD_SIMD
        for (int l = 0; l < kLanes; ++l) {
            const Pair pair = exponentials(x[l], w[l], m, k);
            z_s[l] += pair.e_s;
            z_t[l] += pair.e_t;
            const bool counts = pair.x_t >= kFlush;
            const float rounded = (x[l] - m.student) - (w[l] - m.teacher);
            float difference;
            if (distance == Distance::far) {
                b1[l] += counts ? pair.e_t * rounded : 0.0f;
                difference = keep ? probability_difference(pair.e_s, pair.e_t, pair.delta) : 0.0f;
            } else {
                const float delta = distance == Distance::near ? rounded * k.unit : pair.delta;
                const Share part = share(pair.e_s - pair.e_t, pair.e_t, delta, counts);
                b1[l] += part.b1;
                b2[l] += part.b2;
                apart[l] += part.excess;
                difference = part.excess;
            }
            if (hard != Hard::off) {
                const float e = exchanged ? hard_exponential<hard>(pair.e_t, w[l], m.teacher)
                                          : hard_exponential<hard>(pair.e_s, x[l], m.student);
                z_1[l] += e;
                if (keep && hard == Hard::exponential) e_1[j + l] = e;
            }
            if (keep) {
                excess[j + l] = difference;
                e_t[j + l] = pair.e_t;
            }
        }
    };
    for (; j + kLanes <= end; j += kLanes) step(s + j, t + j, j);
    if (j < end) step(Tail<Float32, kLanes>::of(s + j, end - j).x, Tail<Float32, kLanes>::of(t + j, end - j).x, j);
    return {total(z_s), total(z_t), total(b1), total(b2), total(apart), total(z_1)};
}

template <Hard hard, class Dtype, class Teacher, bool past_caches>
FKD_CLONES void gradient_of(const typename Dtype::Bits* s, const typename Teacher::Bits* t, int n, GradientScales r,
                            Scales k, typename Dtype::Bits* g) {
    constexpr int lanes = kLanes * 4 / sizeof(*g);
    const float by_e_t = r.soft * r.row.sums.per_z_t, ratio = r.row.sums.per_z_s / r.row.sums.per_z_t;
    // (No __restrict: g may be s.)
    const auto step = [&](const auto* x, const auto* w, auto* out) FKD_INLINED {
        for (int l = 0; l < lanes; l += kLanes) {
            FKD_PREFETCH(x + kAhead + l);
            FKD_PREFETCH(w + kAhead + l);
        }
        FKD_SIMD
        for (int l = 0; l < lanes; ++l) {
            const float logit = Dtype::widened(x[l]);
            const Pair pair = exponentials<sizeof(*w) == 4>(logit, Teacher::widened(w[l]), r.centre, k);
            const float difference = probability_difference(ratio * pair.e_s, pair.e_t, pair.delta - r.row.log_ratio);
            float y = r.constant;
            if (hard != Hard::off) y += r.hard * hard_exponential<hard>(pair.e_s, logit, r.centre.student);
            out[l] = Dtype::narrowed(y + by_e_t * difference);
        }
    };
    int j = 0;
    for (; j + lanes <= n; j += lanes) {
        if constexpr (past_caches) {
            alignas(16) float out[kLanes];
            step(s + j, t + j, out);
            store_past_caches(out, g + j);
        } else {
            step(s + j, t + j, g + j);
        }
    }
    if (j < n) {
        typename Dtype::Bits out[lanes];
        step(Tail<Dtype, lanes>::of(s + j, n - j).x, Tail<Teacher, lanes>::of(t + j, n - j).x, out);
        std::memcpy(g + j, out, sizeof(*g) * static_cast<size_t>(n - j));
    }
}

template <Hard hard, class Dtype, bool past_caches>
FKD_CLONES void gradient_of_kept(const float* __restrict excess, const float* __restrict e_t,
                                 const float* __restrict e_1, int n, KeptFactors f,
                                 typename Dtype::Bits* __restrict g) {
    const auto at = [&](int j) FKD_INLINED {
        float y = excess[j] * f.by_excess + (e_t[j] * f.by_e_t + f.constant);
        if (hard == Hard::exponential) y += e_1[j] * f.by_e_1;
        if (hard == Hard::same) y += (excess[j] + e_t[j]) * f.by_e_1;
        if (hard == Hard::square) y += (excess[j] + e_t[j]) * (excess[j] + e_t[j]) * f.by_e_1;
        return Dtype::narrowed(y);
    };
    int j = 0;
    if constexpr (past_caches) {
        alignas(16) float out[kLanes];
        for (; j + kLanes <= n; j += kLanes) {
            FKD_SIMD
            for (int l = 0; l < kLanes; ++l) out[l] = at(j + l);
            store_past_caches(out, g + j);
        }
    }
    FKD_SIMD
    for (int l = j; l < n; ++l) g[l] = at(l);
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

template <class Dtype>
FKD_CLONES void hard_gradient_of(const float* s, int n, GradientScales r, typename Dtype::Bits* g) {
    FKD_SIMD
    for (int j = 0; j < n; ++j)
        g[j] = Dtype::narrowed(r.hard * hard_exponential<Hard::exponential>(0, s[j], r.centre.student) + r.constant);
}

template <class Dtype>
FKD_CLONES void hard_gradient_of_kept(const float* __restrict e_1, int n, KeptFactors f,
                                      typename Dtype::Bits* __restrict g) {
    FKD_SIMD
    for (int j = 0; j < n; ++j) g[j] = Dtype::narrowed(e_1[j] * f.by_e_1 + f.constant);
}

template <class Dtype, bool past_caches>
FKD_CLONES void narrow_all(const float* x, int n, typename Dtype::Bits* out) {
    int j = 0;
    if constexpr (past_caches) {
        alignas(16) float some[kLanes];
        for (; j + kLanes <= n; j += kLanes) {
            std::memcpy(some, x + j, sizeof(some));
            store_past_caches(some, out + j);
        }
    }
    FKD_SIMD
    for (int l = j; l < n; ++l) out[l] = Dtype::narrowed(x[l]);
}

template <class Dtype>
FKD_CLONES void widen_all(const typename Dtype::Bits* __restrict x, int n, float* __restrict out) {
    FKD_SIMD
    for (int j = 0; j < n; ++j) out[j] = Dtype::widened(x[j]);
}

}  // namespace

BlockSums block_sums(Hard hard, bool exchanged, const float* s, const float* t, int n, Centre m, const Scales& k,
                     Distance guess, bool sure, const Kept* kept, const Ahead& ahead) {
    const int run = sure ? kRun : kBlock;
    return with_hard(hard, [&](auto h) {
        const auto sums = [&](auto d) {
            const auto part = [&](int j, int end) {
                const auto none = Kept{};
                const auto [excess, e_t, e_1] = kept ? *kept : none;
                if (exchanged) return sums_of<h.value, true, d.value, false>(s, t, j, end, m, k, excess, e_t, e_1, ahead);
                return kept ? sums_of<h.value, false, d.value, true>(s, t, j, end, m, k, excess, e_t, e_1, ahead)
                            : sums_of<h.value, false, d.value, false>(s, t, j, end, m, k, excess, e_t, e_1, ahead);
            };
            BlockSums all = {};
            for (int j = 0; j < n; j += run) all += part(j, std::min(j + run, n));
            if (d.value == Distance::far) {
                all.b1 *= k.unit;
                all.excess = all.z_s - all.z_t;
                all.b2 = all.excess - all.b1;
            }
            return all;
        };
        if (guess == Distance::far) {
            const BlockSums a = sums(std::integral_constant<Distance, Distance::far>());
            if (a.b2 >= kFar * a.z_t) return a;
        }
        if (guess != Distance::close) {
            const BlockSums a = sums(std::integral_constant<Distance, Distance::near>());
            if (a.b2 >= kNear * a.z_t) return a;
        }
        return sums(std::integral_constant<Distance, Distance::close>());
    });
}

void block_gradient(Hard hard, Input s, Input t, int n, const GradientScales& r, const Scales& k, Output g) {
    with_hard(hard, [&](auto h) {
        with_dtype(g.dtype, [&](auto d) {
            const auto* student = elements(s.data, d);
            auto* gradient = elements(g.data, d);
            const auto run = [&](auto teacher, auto past_caches) {
                gradient_of<h.value, decltype(d), decltype(teacher), past_caches.value>(
                    student, elements(t.data, teacher), n, r, k, gradient);
            };
            if constexpr (std::is_same_v<decltype(d), Float32>)
                if (g.past_caches) return run(Float32(), std::true_type());
            t.dtype == s.dtype ? run(d, std::false_type()) : run(Float32(), std::false_type());
        });
    });
}

void block_gradient_of_kept(Hard hard, const Kept& kept, int n, const KeptFactors& f, Output g) {
    with_hard(hard, [&](auto h) {
        with_dtype(g.dtype, [&](auto d) {
            if constexpr (std::is_same_v<decltype(d), Float32>)
                if (g.past_caches)
                    return gradient_of_kept<h.value, Float32, true>(kept.excess, kept.e_t, kept.e_1, n, f,
                                                                    elements(g.data, d));
            gradient_of_kept<h.value, decltype(d), false>(kept.excess, kept.e_t, kept.e_1, n, f, elements(g.data, d));
        });
    });
}

void finish_stores() {
#if defined(__SSE__)
    _mm_sfence();
#endif
}

void block_hard_gradient(const float* s, int n, const GradientScales& r, Output g) {
    with_dtype(g.dtype, [&](auto d) { hard_gradient_of<decltype(d)>(s, n, r, elements(g.data, d)); });
}

void block_hard_gradient_of_kept(const Kept& kept, int n, const KeptFactors& f, Output g) {
    with_dtype(g.dtype, [&](auto d) { hard_gradient_of_kept<decltype(d)>(kept.e_1, n, f, elements(g.data, d)); });
}

void widen(const void* x, int64_t dtype, int n, float* out) {
    dtype == FKD_BFLOAT16 ? widen_all<Bfloat16>(static_cast<const uint16_t*>(x), n, out)
                          : widen_all<Float16>(static_cast<const uint16_t*>(x), n, out);
}

void narrow(float x, Output out) {
    with_dtype(out.dtype, [&](auto d) { *elements(out.data, d) = d.narrowed(x); });
}

void narrow(const float* x, int n, Output out) {
    with_dtype(out.dtype, [&](auto d) {
        if constexpr (std::is_same_v<decltype(d), Float32>)
            if (out.past_caches) return narrow_all<Float32, true>(x, n, elements(out.data, d));
        narrow_all<decltype(d), false>(x, n, elements(out.data, d));
    });
}

float block_hard_sum(const float* s, int n, float student_max, float* e_1) {
    return e_1 ? hard_sum_of<true>(s, n, student_max, e_1) : hard_sum_of<false>(s, n, student_max, e_1);
}

FKD_CLONES float block_maximum(const float* x, int n) {
    constexpr int lanes = 2 * kLanes;
    float top[lanes];
    int32_t magnitude[lanes] = {};  // the bits of |x|: as integers, those of a NaN are the largest
    for (int l = 0; l < lanes; ++l) top[l] = kLowest;
    const auto step = [&](const float* y) FKD_INLINED {
        FKD_SIMD
        for (int l = 0; l < lanes; ++l) {
            const int32_t bits = static_cast<int32_t>(bits_of(y[l]) & 0x7fffffffu);
            top[l] = top[l] < y[l] ? y[l] : top[l];
            magnitude[l] = magnitude[l] < bits ? bits : magnitude[l];
        }
    };
    int j = 0;
    for (; j + lanes <= n; j += lanes) step(x + j);
    if (j < n) step(Tail<Float32, lanes>::of(x + j, n - j).x);
    const bool nan = joined<lanes>(magnitude, larger<int32_t>) > 0x7f800000;
    return nan ? NAN : joined<lanes>(top, larger<float>);
}

FKD_CLONES double block_sum(const float* x, int n) {
    double sum = 0;
    FKD_SIMD_SUM(sum)
    for (int j = 0; j < n; ++j) sum += x[j];
    return sum;
}

FKD_CLONES Sample block_sample(const float* s, const float* t, int n, float teacher_max, Scales k) {
    const int some = n < 64 ? n : 64;
    float difference = 0, square = 0, mass = 0;
    FKD_SIMD_SUM(difference, square, mass)
    for (int j = 0; j < some; ++j) {
        const float d = s[j] - t[j], e_t = exp2_of((t[j] - teacher_max) * k.log2);
        const bool finite = std::fabs(d) < 1e15f;
        difference += finite ? e_t * d : 0.0f;
        square += finite ? e_t * d * d : 0.0f;
        mass += finite ? e_t : 0.0f;
    }
    if (!(mass > 0)) return {0, 0, 0};
    difference /= mass;
    return {difference, mass * static_cast<float>(n) / static_cast<float>(some), square / mass - difference * difference};
}

FKD_CLONES void block_scale(const float* x, int n, float from, float factor, float* out) {
    FKD_SIMD
    for (int j = 0; j < n; ++j) out[j] = (x[j] - from) * factor;
}

FKD_CLONES EntropySums block_entropy_sums(const float* t, int n, float teacher_max, const Scales& k) {
    const float scale = k.log2;
    float h = 0, rest = 0;
    FKD_SIMD_SUM(h, rest)
    for (int j = 0; j < n; ++j) {
        const float x = (t[j] - teacher_max) * scale, e_t = exp2_of(x);
        h += e_t > 0 ? e_t * x : 0.0f;
        rest += t[j] == teacher_max ? 0.0f : e_t;
    }
    return {h, rest};
}

}  // namespace fused_kd
