// What a row's pieces say: its terms, and the numbers that its gradient needs.
#pragma once
#include "work.h"

namespace fused_kd {

FKD_GPU Piece packed(const Partial<double>& a) {
    Piece p;
    p.max_s = a.max_s;
    p.max_t = a.max_t;
    p.z_s = static_cast<float>(a.z_s);
    p.z_t = static_cast<float>(a.z_t);
    p.b1 = static_cast<float>(a.b1);
    p.b2 = static_cast<float>(a.b2);
    p.excess = static_cast<float>(a.excess);
    p.h = static_cast<float>(a.h);
    p.rest = static_cast<float>(a.rest);
    p.z_1 = static_cast<float>(a.z_1);
    p.sum = static_cast<float>(a.sum);
    return p;
}

FKD_GPU Partial<double> unpacked(const Piece& p) {
    Partial<double> a;
    a.max_s = p.max_s;
    a.max_t = p.max_t;
    a.z_s = p.z_s;
    a.z_t = p.z_t;
    a.b1 = p.b1;
    a.b2 = p.b2;
    a.excess = p.excess;
    a.h = p.h;
    a.rest = p.rest;
    a.z_1 = p.z_1;
    a.sum = p.sum;
    return a;
}

FKD_GPU float logit_of(const FkdRows& rows, int64_t row, int64_t column) {
    const int64_t at = row_offset(rows, row) + column;
    if (rows.dtype == FKD_FLOAT32) return static_cast<const float*>(rows.data)[at];
    const uint16_t bits = static_cast<const uint16_t*>(rows.data)[at];
    return rows.dtype == FKD_BFLOAT16 ? Bfloat16::widened(bits) : Float16::widened(bits);
}

// One thread: all that the forward says of a row.
FKD_GPU void write_row(const Work& w, int64_t row, int64_t target, const Partial<double>& a, float* stats) {
    const RowScales k(w);
    Row<double> result;
    double max_t = 0, soft = 0, hard = 0;
    float teacher = 0, student = static_cast<float>(a.max_s);
    if (w.use_soft) {
        finish_soft(a, result);
        soft = result.kl + (w.entropy ? teacher_entropy(a) : 0);
        const double factor = w.tempered ? w.teacher_factor : 1;
        teacher = static_cast<float>(a.max_t / factor);
        max_t = teacher * factor;
    }
    if (w.use_hard && target >= 0) {
        const double logit = logit_of(w.student, row, target);
        finish_hard(a, a.max_s, logit, result);
        hard = smoothed(result.nll, logit, a.sum, w.columns, static_cast<double>(w.smoothing));
    }
    const double down_s = a.max_s - student, down_t = w.use_soft ? a.max_t - max_t : 0;
    w.soft[row] = static_cast<float>(soft);
    w.hard[row] = static_cast<float>(hard);
    stats[FKD_STUDENT_MAX] = student;
    stats[FKD_TEACHER_MAX] = teacher;
    stats[FKD_STUDENT_SUM] = static_cast<float>(a.z_s * std::exp2(down_s * k.log2));
    stats[FKD_TEACHER_SUM] = static_cast<float>(a.z_t * std::exp2(down_t * k.log2));
    stats[FKD_LOG_RATIO] = static_cast<float>(result.log_ratio + (down_s - down_t) * k.unit);
    stats[FKD_HARD_SUM] = static_cast<float>(result.hard_sum * std::exp2(down_s * kLog2E));
    stats[FKD_MISS] = static_cast<float>(result.miss);
    stats[FKD_GROWTH] = stats[FKD_TOP] = 0;
}

// One warp: a row's pieces, in the order of their sections, and then the row.
FKD_GPU void finish_row(const Work& w, int64_t row, int64_t target, const Piece* pieces, float* stats) {
    if (!readable(target, w.columns)) {
        const float value = unread_value(target);
        const int i = lane_index();
        if (i < FKD_STATS) stats[i] = value;
        if (i == 0) w.soft[row] = w.hard[row] = value;
        return;
    }
    const RowScales k(w);
    Partial<double> a;
    for (int i = lane_index(); i < w.sections; i += kWarp)
        a = i < kWarp ? unpacked(pieces[i]) : merge(a, unpacked(pieces[i]), k);
    if (w.sections > 1) a = warp_merged(a, k);
    if (lane_index() == 0) write_row(w, row, target, a, stats);
}

}  // namespace fused_kd
