// FKD_REST: the sum over the columns that a sparse teacher's ids do not name, and its gradient.
#pragma once
#include "second_sweep.h"

namespace fused_kd {

struct Rest {};

// z = sum of exp((s - from) / tau), of a lane, a section or a row.
struct RestSum {
    double z = 0;
    float from = kLowest;

    FKD_GPU_MEMBER void measure_from(float to, const RestScale& k) {
        const Exponential down = fine_exponential(from, to, k);
        z *= static_cast<double>(down.whole) + static_cast<double>(down.part);
        from = to;
    }
    // -inf is no column.
    FKD_GPU_MEMBER void add(const float* s, const RestScale& k) {
        float top = s[0];
#pragma unroll
        for (int i = 1; i < kChunk; ++i) top = upper(top, s[i]);
        if (top > from) measure_from(top, k);
        float whole = 0, part = 0;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
            const Exponential e = fine_exponential(s[i], from, k);
            whole += e.whole;
            part += e.part;
        }
        z += static_cast<double>(whole) + static_cast<double>(part);
    }
    FKD_GPU_MEMBER RestSum over_warp(const RestScale& k) const {
        RestSum sum = *this;
        sum.measure_from(warp_max(from), k);
#pragma unroll 1
        for (int distance = kWarp / 2; distance > 0; distance /= 2)
            sum.z += __shfl_xor_sync(kAllLanes, sum.z, distance);
        return sum;
    }
};

// A section's columns by which of them are listed: a byte each, those of kGroup columns as one number.
constexpr int kFlags = kSection / kGroup;

// By one warp.
FKD_GPU void flag_listed(const FkdRows& ids, int64_t row, const Range& range, uint64_t* listed) {
    for (int i = lane_index(); i < kFlags; i += kWarp) listed[i] = 0;
    __syncwarp();
    const int64_t* id = static_cast<const int64_t*>(ids.data) + row_offset(ids, row);
    for (int64_t i = lane_index(); i < ids.columns; i += kWarp) {
        const int64_t column = id[i] - range.begin;
        if (column >= 0 && column < range.n) reinterpret_cast<unsigned char*>(listed)[column] = 1;
    }
    __syncwarp();
}

// As add_steps does.
template <class V, Loads loads>
FKD_GPU void add_rest_steps(RestSum& sum, const RowView<V>& row, const uint64_t* listed, int steps, const RestScale& k) {
    RowView<V> at = row.from(lane_index() * kGroup);
    if (loads == Loads::shifted) at.round_down();
    listed += lane_index();
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
        float s[kChunk], t[kChunk];
        load_chunk<V, loads>(at, s, t);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            const uint64_t flags = listed[g * kWarp];
#pragma unroll
            for (int j = 0; j < kGroup; ++j)
                s[g * kGroup + j] = flags >> 8 * j & 1 ? -INFINITY : s[g * kGroup + j];
        }
        at = at.from(kStep);
        listed += kStep / kGroup;
        sum.add(s, k);
    }
}

// One warp: the sum over a section's columns that are not listed.
template <class V>
FKD_GPU RestSum section_rest(const Work& w, const RowView<V>& row, const Range& range, const uint64_t* listed) {
    RestSum sum;
    const int steps = range.n / kStep, whole = steps * kStep;
    if (row.aligned())
        add_rest_steps<V, Loads::whole>(sum, row, listed, steps, w.rest);
    else if (range.shifts_until(whole))
        add_rest_steps<V, Loads::shifted>(sum, row, listed, steps, w.rest);
    else
        add_rest_steps<V, Loads::single>(sum, row, listed, steps, w.rest);
    float s[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {  // what is left after the last step
        const int column = whole + lane_index() + i * kWarp;
        const bool counts = column < range.n && !reinterpret_cast<const unsigned char*>(listed)[column];
        s[i] = counts ? row.s(column) : -INFINITY;
    }
    sum.add(s, w.rest);
    return sum.over_warp(w.rest);
}

// One thread: log R, and what stats have of R.
FKD_GPU void conclude_rest(const Work& w, int64_t row, float* stats) {
    const RestSum* pieces = static_cast<const RestSum*>(w.terms) + row * w.sections;
    float from = kLowest;
    for (int i = 0; i < w.sections; ++i) from = upper(from, pieces[i].from);
    const double log2 = static_cast<double>(w.rest.high) + static_cast<double>(w.rest.low);
    double z = 0;
    for (int i = 0; i < w.sections; ++i)
        z += pieces[i].z * std::exp2((static_cast<double>(pieces[i].from) - static_cast<double>(from)) * log2);
    stats[FKD_TEACHER_MAX] = from;
    stats[FKD_STUDENT_SUM] = static_cast<float>(z);
    stats[FKD_LOG_RATIO] = static_cast<float>(z - static_cast<double>(stats[FKD_STUDENT_SUM]));
    w.soft[row] = static_cast<float>((static_cast<double>(from) * log2 + std::log2(z)) * kLn2);
}

template <class V>
struct OtherGradient<V, Rest> {
    static constexpr bool careful = false;
    HardGradient hard;
    float from, student, log2, by;

    FKD_GPU_MEMBER OtherGradient(const Work& w, int64_t row, int64_t target, const float* stats)
        : hard(w, row, target, stats), from(stats[FKD_TEACHER_MAX]), student(stats[FKD_STUDENT_MAX]), log2(w.rest.high) {
        const float sum = stats[FKD_STUDENT_SUM];
        by = sum == 0 ? 0 : w.grad_soft[row] * w.unit / sum;
    }
    FKD_GPU_MEMBER float operator()(float s, float t, bool own = false) const { return fast(s, t, own); }
    FKD_GPU_MEMBER float fast(float s, float, bool own = false) const {
        return std::fma(by, power((s - from) * log2), hard(s, student, own));
    }
};

}  // namespace fused_kd
