// The second sweep over a row whose sums are finished, and the gradients that are not q - p, by the formulas of
// row_math.h and families.h as they stand.
#pragma once
#include "backward.h"
#include "../families.h"

namespace fused_kd {

// A row's logits, measured from the points in stats.
struct FinishedRow {
    Scales scales;
    Centre centre;
    Finished row;
    float teacher_from, teacher_factor;
    bool tempered, of_logits;

    FKD_GPU_MEMBER FinishedRow(const Work& w, const float* stats)
        : scales(static_cast<double>(w.temperature)), row(Finished::of(stats, true)),
          teacher_from(stats[FKD_TEACHER_MAX]),
          teacher_factor(w.teacher_factor), tempered(w.tempered), of_logits(w.divergence == FKD_LOGIT_MSE) {
        if (w.columns == 1 && !of_logits) scales.unit = 0;
        centre = Centre::of(stats[FKD_STUDENT_MAX], tempered ? 0.0f : teacher_from);
    }
    FKD_GPU_MEMBER float teacher(float t) const {
        return tempered ? (t - (of_logits ? 0.0f : teacher_from)) * teacher_factor : t;
    }
    FKD_GPU_MEMBER float student_exponent(float s) const { return (s - centre.student) * scales.log2; }
    FKD_GPU_MEMBER float teacher_exponent(float t) const { return (t - centre.teacher) * scales.log2; }
    FKD_GPU_MEMBER float delta(float s, float t) const { return centre.difference(s, t) * scales.unit; }
};

template <class Family>
struct TermsOf {
    using Sums = TermSums<float>;
    FinishedRow at;
    FamilyNumbers numbers;

    FKD_GPU_MEMBER TermsOf(const Work& w, const float* stats) : at(w, stats), numbers(w.numbers) {}

    FKD_GPU_MEMBER void add(Sums& sums, const float* s, const float* logits, int n) const {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
            if (i >= n) break;
            const float t = at.teacher(logits[i]);
            const Terms part = Family::terms(numbers, at.row.sums, at.student_exponent(s[i]), at.teacher_exponent(t),
                                             at.delta(s[i], t) - at.row.log_ratio);
            const bool rest = part.q <= 0.5f;
            sums.v += part.v;
            sums.c += part.c;
            sums.rest_c += rest ? part.c : 0.0f;
            sums.rest_q += rest ? part.q : 0.0f;
        }
    }
    FKD_GPU_MEMBER Sums over_warp(Sums sums) const {
#pragma unroll 1
        for (int distance = kWarp / 2; distance > 0; distance /= 2) {
            Sums other;
            other.v = __shfl_xor_sync(kAllLanes, sums.v, distance);
            other.c = __shfl_xor_sync(kAllLanes, sums.c, distance);
            other.rest_c = __shfl_xor_sync(kAllLanes, sums.rest_c, distance);
            other.rest_q = __shfl_xor_sync(kAllLanes, sums.rest_q, distance);
            sums += other;
        }
        return sums;
    }
};

template <>
struct TermsOf<LogitMSE> {
    using Sums = Moments<float>;
    FinishedRow at;

    FKD_GPU_MEMBER TermsOf(const Work& w, const float* stats) : at(w, stats) {}

    FKD_GPU_MEMBER void add(Sums& sums, const float* s, const float* logits, int n) const {
        Sums chunk;
        float x[kChunk];
        bool counts[kChunk];
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
            counts[i] = i < n && s[i] != -INFINITY && logits[i] != -INFINITY;
            x[i] = counts[i] ? (s[i] - at.teacher(logits[i])) * at.scales.unit : 0;
            chunk.count += counts[i] ? 1.0f : 0.0f;
            chunk.mean += x[i];
        }
        if (chunk.count == 0) return;
        chunk.mean /= chunk.count;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
            const float apart = x[i] - chunk.mean;
            chunk.squares += counts[i] ? apart * apart : 0.0f;
        }
        sums += chunk;
    }
    FKD_GPU_MEMBER Sums over_warp(Sums sums) const {
#pragma unroll 1
        for (int distance = kWarp / 2; distance > 0; distance /= 2) {
            Sums other;
            other.count = __shfl_xor_sync(kAllLanes, sums.count, distance);
            other.mean = __shfl_xor_sync(kAllLanes, sums.mean, distance);
            other.squares = __shfl_xor_sync(kAllLanes, sums.squares, distance);
            sums += other;
        }
        return sums;
    }
};

// As Lanes does: whole steps, in pieces of 16 bytes where the row lies so, and the columns after the last one by one.
template <class V, class Terms>
FKD_GPU typename Terms::Sums section_terms(const Terms& terms, const RowView<V>& row, const Range& range) {
    typename Terms::Sums sums;
    const int steps = range.n / kStep, whole = steps * kStep;
    const bool aligned = row.aligned();
    RowView<V> at = row.from(lane_index() * kGroup);
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
        float s[kChunk], t[kChunk];
        if (aligned)
            load_chunk<V, Loads::whole>(at, s, t);
        else
            load_chunk<V, Loads::single>(at, s, t);
        at = at.from(kStep);
        terms.add(sums, s, t, kChunk);
    }
#pragma unroll 1
    for (int column = whole + lane_index(); column < range.n; column += kWarp) {
        float s[kChunk] = {row.s(column)}, t[kChunk] = {row.t(column)};
        terms.add(sums, s, t, 1);
    }
    return terms.over_warp(sums);
}

// The hard term's part of a gradient.
struct HardGradient {
    float by = 0, at_label = 0, constant = 0;

    FKD_GPU_MEMBER HardGradient(const Work& w, int64_t row, int64_t target, const float* stats) {
        if (!w.use_hard || target < 0) return;
        by = w.grad_hard[row] / stats[FKD_HARD_SUM];
        constant = -w.grad_hard[row] * w.smoothing / static_cast<float>(w.columns);
        at_label = w.grad_hard[row] * (w.smoothing - stats[FKD_MISS]) + constant;
    }
    FKD_GPU_MEMBER float operator()(float s, float student_max, bool own) const {
        const float e_1 = hard_exponential<Hard::exponential>(0, s, student_max);
        return own ? at_label : by == 0 ? constant : std::fma(by, e_1, constant);
    }
};

// As RowGradient, for every divergence that has no q - p.
template <class V, class Kind>
struct OtherGradient {
    static constexpr bool careful = false;
    FinishedRow at;
    FamilyNumbers numbers;
    HardGradient hard;
    float soft;

    FKD_GPU_MEMBER OtherGradient(const Work& w, int64_t row, int64_t target, const float* stats)
        : at(w, stats), numbers(w.numbers), hard(w, row, target, stats), soft(w.grad_soft[row] * at.scales.unit) {}
    FKD_GPU_MEMBER float operator()(float s, float t, bool own = false) const { return fast(s, t, own); }
    FKD_GPU_MEMBER float fast(float s, float logit, bool own = false) const {
        const float t = at.teacher(logit);
        const Slope slope = SlopeOf<Kind>::at(at.student_exponent(s), at.teacher_exponent(t), at.delta(s, t),
                                              (s - t) * at.scales.unit, at.row, numbers);
        return soft * slope.soft + hard(s, at.centre.student, own);
    }
};

// One warp: a row's sums of terms, or its moments, and what they say.
FKD_GPU void conclude_row(const Work& w, int64_t row, float* stats) {
    if (w.divergence == FKD_LOGIT_MSE) {
        const Moments<float>* pieces = static_cast<const Moments<float>*>(w.terms) + row * w.sections;
        Moments<double> all;
        for (int i = 0; i < w.sections; ++i) all += pieces[i];
        if (lane_index() == 0) w.soft[row] = static_cast<float>(mean_squares(all, w.numbers.parameter[0] != 0, stats));
        return;
    }
    const TermSums<float>* pieces = static_cast<const TermSums<float>*>(w.terms) + row * w.sections;
    TermSums<double> all;
    for (int i = 0; i < w.sections; ++i) all += pieces[i];
    if (lane_index() != 0) return;
    const float log_ratio = stats[FKD_LOG_RATIO];
    const double growth = all.growth();
    w.soft[row] = log_ratio == log_ratio ? static_cast<float>(all.v) : NAN;
    stats[FKD_GROWTH] = static_cast<float>(growth);
    stats[FKD_TOP] = static_cast<float>(w.divergence == FKD_REVERSE_KL ? -growth - log_ratio : all.top());
}

}  // namespace fused_kd
