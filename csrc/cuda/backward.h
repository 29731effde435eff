// The gradient of a section of a row, by one warp.
#pragma once
#include "forward.h"

namespace fused_kd {

// Below this |d| a gradient in 16 bits takes exp(d) - 1 as d + d * d / 2, off by 2^-14 of itself at most.
constexpr float kSmall16 = 1.0f / 64;

template <class V>
struct RowGradient {
    LaneScales<V::hard> k;
    Scales scales;
    Centre centre;
    float max_s, max_t, hard_point;     // exponents of 2 that this row's are measured from
    float per_z_s, per_z_t, log_ratio;  // for the formulas of row_math.h
    float soft, hard, at_label, constant;
    float by_t, ratio, by_1, from;
    float teacher_from, teacher_factor;
    bool labelled, tempered, careful;

    FKD_GPU_MEMBER RowGradient(const Work& w, int64_t row, int64_t target, const float* stats)
        : k(w.k_s, w.k_t, w.unit), scales(static_cast<double>(w.temperature)) {
        if (w.columns == 1) scales.unit = 0;
        tempered = V::general && w.tempered;
        const float student = stats[FKD_STUDENT_MAX], teacher = stats[FKD_TEACHER_MAX];
        centre = Centre::of(student, V::soft && !tempered ? teacher : 0.0f);
        teacher_from = teacher;
        teacher_factor = w.teacher_factor;
        // Far above the student's point exponents have few digits left behind theirs: there they are taken from log2(Z_s),
        // and what that makes of the factors below from double.
        const bool above = V::soft && stats[FKD_STUDENT_SUM] > 1 << 24;
        max_s = student * k.s + (above ? to_grid(std::log2(stats[FKD_STUDENT_SUM])) : 0.0f);
        max_t = V::soft ? teacher * k.t : 0.0f;
        careful = !(std::fabs(max_s) < kLargest && std::fabs(max_t) < kLargest);
        hard_point = k.hard_point(max_s);
        soft = by_t = ratio = from = log_ratio = per_z_s = per_z_t = 0;
        // What the products leave over of the points in stats.
        const double exact_s = static_cast<double>(student) * k.s - max_s;
        const float rest_s = static_cast<float>(exact_s), rest_t = std::fma(teacher, k.t, -max_t);
        if (V::soft) {
            soft = w.grad_soft[row] * scales.unit;
            per_z_s = 1 / stats[FKD_STUDENT_SUM];
            per_z_t = 1 / stats[FKD_TEACHER_SUM];
            log_ratio = stats[FKD_LOG_RATIO];
            by_t = soft * per_z_t / power(rest_t);
            ratio = per_z_s * stats[FKD_TEACHER_SUM] *
                    (above ? static_cast<float>(std::exp2(rest_t - exact_s)) : power(rest_t - rest_s));
            from = std::fma(rest_t - rest_s, kLn2f, -log_ratio);
        }
        hard = by_1 = at_label = constant = 0;
        labelled = V::hard != Hard::off && w.use_hard && target >= 0;
        if (labelled) {
            hard = w.grad_hard[row] / stats[FKD_HARD_SUM];
            const double rest_1 = V::hard == Hard::square ? 2 * exact_s
                                  : V::hard == Hard::same ? exact_s
                                                          : static_cast<double>(student) * static_cast<float>(kLog2E) - hard_point;
            by_1 = above ? static_cast<float>(hard * std::exp2(-rest_1)) : hard / power(static_cast<float>(rest_1));
            constant = -w.grad_hard[row] * w.smoothing / static_cast<float>(w.columns);
            at_label = w.grad_hard[row] * (w.smoothing - stats[FKD_MISS]) + constant;
        }
    }

    // What remains of the gradient at the label is at_label: softmax(s) - 1 would lose it for a sure student.
    FKD_GPU_MEMBER float operator()(float s, float t, bool own = false) const {
        return careful ? plain(s, t, own) : fast(s, t, own);
    }

    FKD_GPU_MEMBER float fast(float s, float t, bool own = false) const {
        const float x_s = std::fma(s, k.s, -max_s), e_s = power(x_s);
        float y = 0;
        if (V::hard != Hard::off) {
            const float e_1 = V::hard == Hard::same     ? e_s
                              : V::hard == Hard::square ? e_s * e_s
                                                        : power(std::fma(s, static_cast<float>(kLog2E), -hard_point));
            y = own ? at_label : std::fma(by_1, e_1, constant);
        }
        if (!V::soft) return y;
        const float x_t = std::fma(t, k.t, -max_t), e_t = power(x_t);
        float d = std::fma(x_s - x_t, kLn2f, from);  // log(q / p)
        if (V::fine && !(V::general && tempered))
            d = std::fma(centre.difference(s, t), k.natural, -log_ratio);
        const float rough = std::fabs(d) < kSmall16 ? e_t * std::fma(d, 0.5f * d, d) : std::fma(ratio, e_s, -e_t);
        const float difference = V::fine ? probability_difference(ratio * e_s, e_t, d) : rough;
        return V::hard == Hard::off ? by_t * difference : std::fma(by_t, difference, y);
    }

    // With the formulas of row_math.h as they stand: for logits too large for an FMA.
    FKD_GPU_MEMBER float plain(float s, float t, bool own) const {
        const Pair pair = exponentials(s, tempered ? (t - teacher_from) * teacher_factor : t, centre, scales);
        float y = own ? at_label : constant;
        if (V::hard != Hard::off && !own && labelled)
            y += hard * hard_exponential<V::hard>(pair.e_s, s, centre.student);
        if (!V::soft) return y;
        return y + soft * probability_difference(pair.e_s * per_z_s, pair.e_t * per_z_t, pair.delta - log_ratio);
    }
};

template <class V>
FKD_GPU void store(typename V::Gradient::Bits* to, float x) {
    *to = V::Gradient::narrowed(x);
}

// One column a lane: rows' ends, the columns around the label.
template <class V, class Gradient>
FKD_GPU void fill_columns(const RowView<V>& row, const Gradient& g, typename V::Gradient::Bits* out, int begin,
                           int end, int label) {
#pragma unroll 1
    for (int column = begin + lane_index(); column < end; column += kWarp)
        store<V>(out + column, g(row.s(column), row.t(column), column == label));
}

template <class V, Loads loads, class Gradient>
FKD_GPU void fill_steps(const RowView<V>& row, const Gradient& g, typename V::Gradient::Bits* out, int steps,
                         int left_out) {
    const int first = (left_out == 0) * kStep + lane_index() * kGroup;
    RowView<V> at = row.from(first);
    if (loads == Loads::shifted) at.round_down();
    out += first;
#pragma unroll 1
    for (int i = 1; i <= steps; ++i) {
        float s[kChunk], t[kChunk];
        load_chunk<V, loads>(at, s, t);
#pragma unroll
        for (int j = 0; j < kChunk; ++j) s[j] = g.fast(s[j], t[j]);
#pragma unroll
        for (int j = 0; j < kGroups; ++j)
            store_group(typename V::Gradient(), s + j * kGroup, out + j * kWarp * kGroup);
        const int next = i == left_out ? 2 * kStep : kStep;
        at = at.from(next);
        out += next;
    }
}

// How many columns lie ahead of the first one at a multiple of 16 bytes.
template <class Bits>
FKD_GPU int columns_ahead(const Bits* at) {
    const int past = bytes_past(at);
    return past == 0 ? 0 : (16 - past) / static_cast<int>(sizeof(Bits));
}

template <class V, class Gradient>
FKD_GPU void section_gradient(const RowView<V>& row, const Gradient& g, typename V::Gradient::Bits* out,
                               const Range& range) {
    const int n = range.n, label = range.label;
    // 16-byte stores start at the first column that lies so.
    const int ahead = columns_ahead(out), whole = ahead < n ? (n - ahead) / kStep : 0;
    const RowView<V> body = row.from(ahead);
    const bool aligned = body.aligned();
    const int steps = !g.careful && (aligned || range.shifts_until(ahead + whole * kStep)) ? whole : 0;
    const int last = ahead + steps * kStep;
    const bool here = label >= ahead && label < last;
    const int labelled = here ? (label - ahead) / kStep : steps;
    if (steps > here) {
        if (aligned)
            fill_steps<V, Loads::whole>(body, g, out + ahead, steps - here, labelled);
        else
            fill_steps<V, Loads::shifted>(body, g, out + ahead, steps - here, labelled);
    }
    const int middle = ahead + labelled * kStep;
#pragma unroll 1
    for (int i = 0; i < 3; ++i) {  // before them, the step with the label, after them; or everything
        const int begin = i == 0 ? 0 : i == 1 ? middle : last;
        const int end = i == 0 ? ahead : i == 1 ? middle + here * kStep : n;
        if (steps > 0 || i == 2) fill_columns(row, g, out, steps > 0 ? begin : 0, end, label);
    }
}

// A warp's part of a row: its sections from `first` on, those read last first, as they are still in a cache.
template <class V, class Gradient>
FKD_GPU void row_gradient(const Work& w, int64_t row, int64_t target, const float* stats, int first, int stride) {
    auto* out = static_cast<typename V::Gradient::Bits*>(w.gradient.data) + row_offset(w.gradient, row);
    const bool read = readable(target, w.columns);
    if (read && first < w.sections) {
        const RowView<V> view(w, row);
        const Gradient gradient(w, row, target, stats);
        const int ahead = columns_ahead(out);  // each section is to begin where 16-byte stores can
        for (int section = first + (w.sections - 1 - first) / stride * stride; section >= 0; section -= stride) {
            const Range at(w, section, target, ahead);
            section_gradient<V>(view.from(at.begin), gradient, out + at.begin, at);
        }
    }
    // Rows without a term, and the student's columns that the teacher lacks.
    const float value = read ? 0.0f : unread_value(target);
    for (int64_t column = (read ? w.columns : 0) + first * kWarp + lane_index(); column < w.gradient.columns;
         column += stride * kWarp)
        store<V>(out + column, column < w.columns ? value : 0.0f);
}

}  // namespace fused_kd
