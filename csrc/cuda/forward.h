// The sums of a section of a row, by one warp.
//
// Each lane keeps sums of its own, rescaled once a chunk at most; nothing crosses lanes until the section has been
// read. What does not fit that, a lane does with the formulas of row_math.h as they stand, `carefully`: the columns
// after the last whole step, those around the label, and a section whose logits are too large or that overflowed.
#pragma once
#include "work.h"

namespace fused_kd {

// Beyond this an exponent of 2 has too few bits left behind its point.
constexpr float kLargest = 32768;
// What a lane reads at a time where it goes carefully: few, as that code should be small.
constexpr int kFew = 4;
// A lane measures from a new maximum when it is more than 2^this above the point it measured from.
constexpr float kRise = 2;

template <class V>
struct Lanes {
    LaneScales<V::hard> k;
    float factor;  // tau / teacher's tau
    bool entropy, tempered;
    Partial<float> sums;
    // The column that the sums are measured from, by its logits: from its exponents of 2 on a grid, max_s and max_t of
    // the sums. Only delta is measured from the column itself, so that it is 0 there, and not what the grid leaves
    // over: a teacher that is sure of that column leaves nothing else to see. So e_s to_apart = e_t exp(delta).
    float first_s = kLowest, first_t = kLowest;
    Centre centre;  // at that column
    float apart = 0, to_apart = 1, lag = 0;  // lag: what is to be taken off (x_s - x_t) ln 2
    float hard_point = 0;                    // 2^this is what z_1 is measured from
    bool lost = false;                       // this way does not do

    FKD_GPU_MEMBER explicit Lanes(const Work& w)
        : k(w.k_s, w.k_t, w.unit), factor(w.teacher_factor), entropy(w.entropy), tempered(w.tempered) {}

    FKD_GPU_MEMBER float delta(float s, float t, float x_s, float x_t) const {
        if (V::general && tempered) return std::fma(x_s - x_t, kLn2f, -lag);
        if (V::fine) return centre.difference(s, t) * k.natural;
        return std::fma(s - t, k.natural, -apart);
    }

    // From now on the sums are measured from this column.
    FKD_GPU_MEMBER void measure_from(float s, float t, bool last = false) {
        const float max_t = V::soft ? to_grid(t * k.t) : 0.0f;
        const float max_s = V::soft ? max_t + to_grid(s * k.s - t * k.t) : to_grid(s * k.s);
        const float point = k.hard_point(max_s);
        float rest = std::fma(s, k.s, -max_s) - std::fma(t, k.t, -max_t);
        float from = V::soft ? (s - t) * k.natural : 0.0f;
        if (V::general && tempered) {
            from = ((max_s - max_t) + rest) * kLn2f;
            lag = std::fma(max_t - max_s, kLn2f, from);
            rest = lag * static_cast<float>(kLog2E);
        }
        lost |= !(std::fabs(max_s) < kLargest && std::fabs(max_t) < kLargest);
        const bool exact = V::fine && !(V::general && tempered);
        if (V::general && entropy && t != first_t && sums.z_t > 0) {
            // The column measured from so far, which the grid leaves at another exponent than 0, is one of the others.
            sums.h += (sums.z_t - sums.rest) * std::fma(first_t, k.t, -sums.max_t);
            sums.rest = sums.z_t;
        }
        centre = Centre::of(s, t);
        const float d = exact ? centre.difference(first_s, first_t) * k.natural : apart - from;
        const float down_t = sums.max_t - max_t;
        sums = moved_by(sums, std::fma(d, static_cast<float>(kLog2E), down_t), down_t, hard_point - point, d,
                        last);
        sums.max_s = max_s;
        sums.max_t = max_t;
        first_s = s;
        first_t = t;
        apart = from;
        to_apart = power(-rest);
        hard_point = point;
    }

    FKD_GPU_MEMBER void add(const float* s, const float* t) {
        const float* leading = V::soft ? t : s;
        float top = leading[0];
#pragma unroll
        for (int i = 1; i < kChunk; ++i) top = upper(top, leading[i]);
        if (top * (V::soft ? k.t : k.s) > (V::soft ? sums.max_t : sums.max_s) + kRise) {
            // The largest teacher logit's column: so delta is small for what most of p lies on, wherever the student's
            // own maximum is.
            float at = V::soft ? s[0] : top;
#pragma unroll
            for (int i = 1; i < kChunk; ++i) at = V::soft && t[i] == top ? s[i] : at;
            measure_from(at, top);
        }
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
            const float x_s = std::fma(s[i], k.s, -sums.max_s), e_s = power(x_s);
            if (V::soft) {
                const float x_t = std::fma(t[i], k.t, -sums.max_t), e_t = power(x_t);
                const Share part = share(std::fma(e_s, to_apart, -e_t), e_t, delta(s[i], t[i], x_s, x_t), e_t > 0);
                sums.z_s = std::fma(e_s, to_apart, sums.z_s);
                sums.z_t += e_t;
                sums.b1 += part.b1;
                sums.b2 += part.b2;
                if (V::fine) sums.excess += part.excess;
                if (V::general && entropy && t[i] != first_t) {
                    sums.h = std::fma(e_t, upper(-256, x_t), sums.h);  // 0 log 0 = 0
                    sums.rest += e_t;
                }
            }
            if (V::hard == Hard::same) sums.z_1 += e_s;
            if (V::hard == Hard::square) sums.z_1 += e_s * e_s;
            if (V::hard == Hard::exponential) sums.z_1 += power(std::fma(s[i], static_cast<float>(kLog2E), -hard_point));
            if (V::general || !V::soft) sums.sum += s[i];
        }
    }

    // The warp's sums, measured from the logits of the column with the lanes' largest teacher logit.
    FKD_GPU_MEMBER Partial<double> merged() {
        float s = first_s, t = first_t;
#pragma unroll 1
        for (int distance = kWarp / 2; distance > 0; distance /= 2) {
            const float other_s = __shfl_xor_sync(kAllLanes, s, distance);
            const float other_t = __shfl_xor_sync(kAllLanes, t, distance);
            const bool take = other_t > t || (other_t == t && other_s > s);
            s = take ? other_s : s;
            t = take ? other_t : t;
        }
        measure_from(s, t, true);
        // From the grid to the column.
        const float rest_s = std::fma(s, k.s, -sums.max_s), rest_t = V::soft ? std::fma(t, k.t, -sums.max_t) : 0.0f;
        const float d = V::soft ? -delta(s, t, rest_s, rest_t) : 0.0f;
        const float rest_1 = V::hard == Hard::same     ? rest_s
                             : V::hard == Hard::square ? 2 * rest_s
                                                       : std::fma(s, static_cast<float>(kLog2E), -hard_point);
        Partial<float> own = moved_by(sums, std::fma(d, static_cast<float>(kLog2E), -rest_t), -rest_t, -rest_1, d);
        if (!V::fine) own.excess = own.b1 + own.b2;  // enough for 16 bits, and an instruction a column less
        if (V::general && entropy) {  // not to this column's own exponent, which is 0 now
            own.rest = power(-rest_t) * sums.rest;
            own.h = power(-rest_t) * std::fma(-rest_t, sums.rest, sums.h);
        } else {
            own.rest = 0;
        }
        const Partial<float> a = warp_sum(own);
        const float all = a.z_s + a.z_t + a.b1 + a.b2 + a.h + a.z_1;
        const bool none = V::soft ? a.z_s == 0 || a.z_t == 0 : a.z_1 == 0;
        lost = __any_sync(kAllLanes, lost) || !(std::fabs(all) < INFINITY) || none;
        Partial<double> r;
        r.max_s = s;
        r.max_t = V::soft ? t * static_cast<double>(factor) : 0;
        r.z_s = a.z_s;
        r.z_t = a.z_t;
        r.b1 = a.b1;
        r.b2 = a.b2;
        r.excess = a.excess;
        r.h = a.h;
        r.rest = a.rest;
        r.z_1 = a.z_1;
        r.sum = a.sum;
        return r;
    }
};

// How a lane gets at its columns: in 16-byte pieces, which they fill or which they are shifted in, or one by one.
enum class Loads { whole, shifted, single };

template <class V, Loads loads>
FKD_GPU void load_chunk(const RowView<V>& row, float* s, float* t) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
        const int first = g * kWarp * kGroup;
        if (loads == Loads::single) {
#pragma unroll
            for (int i = 0; i < kGroup; ++i) {
                s[g * kGroup + i] = row.s(first + i);
                if (V::soft) t[g * kGroup + i] = row.t(first + i);
            }
        } else {
            constexpr bool shifted = loads == Loads::shifted;
            row.student.template load<shifted>(first, s + g * kGroup);
            if (V::soft) row.teacher.template load<shifted>(first, t + g * kGroup);
        }
    }
}

// So many steps, leaving out one. Lanes take the same columns whatever the row's alignment: its bits do not depend on
// it.
template <class V, Loads loads>
FKD_GPU void add_steps(Lanes<V>& lanes, const RowView<V>& row, int steps, int left_out) {
    RowView<V> at = row.from((left_out == 0) * kStep + lane_index() * kGroup);
    if (loads == Loads::shifted) at.round_down();
#pragma unroll 1
    for (int i = 1; i <= steps; ++i) {
        float s[kChunk], t[kChunk];
        load_chunk<V, loads>(at, s, t);
        at = at.from(i == left_out ? 2 * kStep : kStep);
        lanes.add(s, t);
    }
}

// One lane's columns of begin .. end, merged into `sums`.
template <class V>
FKD_GPU void add_carefully(Partial<float>& sums, const Work& w, const RowView<V>& row, int begin, int end, int label,
                            const CarefulScales& k) {
#pragma unroll 1
    for (int first = begin + lane_index(); first < end; first += kFew * kWarp) {
        float s[kFew], t[kFew];
        float max_s = kLowest, max_t = kLowest, at = 0;
        bool bad_s = false, bad_t = false;
#pragma unroll
        for (int i = 0; i < kFew; ++i) {
            const int column = first + i * kWarp;
            s[i] = column < end ? row.s(column) : -INFINITY;
            t[i] = column < end ? row.t(column) : -INFINITY;
            bad_s |= !(s[i] < INFINITY);
            bad_t |= !(t[i] < INFINITY);
            max_s = upper(max_s, s[i]);
            at = t[i] > max_t ? s[i] : at;
            max_t = upper(max_t, t[i]);
        }
        // The teacher's own temperature is a factor on its logits, once their maximum is taken off.
        const bool tempered = V::general && w.tempered;
        const float teacher_from = tempered ? max_t : 0.0f, top = tempered ? 0.0f : max_t;
        Sample sample{at - top, 0, 0};
#pragma unroll
        for (int i = 0; i < kFew; ++i) {
            t[i] = tempered ? (t[i] - teacher_from) * k.factor : t[i];
            sample.mass += power((t[i] - top) * k.log2);
        }
        const Centre centre = V::soft ? centre_of(max_s, top, sample, k) : Centre::of(max_s, 0);
        Partial<float> piece;
        piece.max_s = centre.student;
        piece.max_t = !V::soft ? 0 : tempered ? max_t : centre.teacher;
#pragma unroll
        for (int i = 0; i < kFew; ++i) {
            const int column = first + i * kWarp;
            const Pair pair = exponentials(s[i], t[i], centre, k);
            if (V::soft) {
                const Share part = share(pair.e_s - pair.e_t, pair.e_t, pair.delta, pair.e_t > 0);
                piece.z_s += pair.e_s;
                piece.z_t += pair.e_t;
                piece.b1 += part.b1;
                piece.b2 += part.b2;
                piece.excess += part.excess;
                if (V::general && w.entropy) {
                    piece.h += pair.e_t > 0 ? pair.e_t * ((t[i] - centre.teacher) * k.log2) : 0.0f;
                    piece.rest += t[i] == centre.teacher ? 0 : pair.e_t;
                }
            }
            if (V::hard != Hard::off && column != label)
                piece.z_1 += hard_exponential<V::hard>(pair.e_s, s[i], centre.student);
            if (column < end) piece.sum += s[i];
        }
        if (bad_s) piece.z_s = piece.z_1 = piece.b1 = NAN;
        if (V::soft && bad_t) piece.z_t = piece.b1 = NAN;
        if (bad_s || bad_t) piece.max_s = piece.max_t = 0;
        sums = merge(sums, piece, k);
    }
}

FKD_GPU Partial<double> in_double(const Partial<float>& a, const CarefulScales& k) {
    Partial<double> r;
    r.max_s = a.max_s;
    r.max_t = static_cast<double>(a.max_t) * k.factor;
    r.z_s = a.z_s;
    r.z_t = a.z_t;
    r.b1 = a.b1;
    r.b2 = a.b2;
    r.excess = a.excess;
    r.h = a.h;
    r.rest = a.rest;
    r.z_1 = a.z_1;
    r.sum = a.sum;
    return r;
}

// The section's sums, but for the label's own column in z_1.
template <class V>
FKD_GPU Partial<double> section_sums(const Work& w, const RowView<V>& row, const Range& range) {
    const int n = range.n, label = range.label;
    const int steps = n / kStep, whole = steps * kStep;
    const bool here = label >= 0 && label < whole;
    const int labelled = here ? label / kStep : steps;
    Partial<double> total;
    bool lost = false;
    if (steps > here) {
        Lanes<V> lanes(w);
        if (row.aligned())
            add_steps<V, Loads::whole>(lanes, row, steps - here, labelled);
        else if (range.shifts_until(whole))
            add_steps<V, Loads::shifted>(lanes, row, steps - here, labelled);
        else
            add_steps<V, Loads::single>(lanes, row, steps - here, labelled);
        total = lanes.merged();
        lost = lanes.lost;
    }
    if (!lost && !here && whole == n) return total;

    CarefulScales k(static_cast<double>(w.temperature), w.teacher_factor);
    if (w.columns == 1) k.unit = 0;  // both probabilities are 1, whatever the last bit says
    Partial<float> rest;
    // The step with the label, and what is left after the last one; or everything.
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
        const int begin = i == 0 ? labelled * kStep : whole, end = i == 0 ? begin + here * kStep : n;
        add_carefully<V>(rest, w, row, lost && i == 0 ? 0 : begin, lost && i == 0 ? whole : end, label, k);
    }
    const Partial<double> careful = in_double(warp_merged(rest, k), k);
    return lost || steps == here ? careful : merge(total, careful, RowScales(w));
}

}  // namespace fused_kd
