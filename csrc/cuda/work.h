// What a kernel is told, and what it is compiled for.
#pragma once
#include "../families.h"
#include "../rest.h"
#include "warp.h"

namespace fused_kd {

// What a kernel is compiled for. `general`: the options that are not worth a kernel of their own are looked at as it
// runs, and so is the teacher's dtype; `hard` is then Hard::exponential, whether or not there is a hard term.
template <class Student_, class Teacher_, bool soft_, Hard hard_, bool general_, class Gradient_ = Student_>
struct Variant {
    using Student = Student_;
    using Teacher = Teacher_;
    using Gradient = Gradient_;
    static constexpr bool soft = soft_, general = general_;
    static constexpr Hard hard = hard_;
    // A gradient in 16 bits is rounded to 2^-9 or 2^-12 of itself: differences need not be better than 2^-16.
    static constexpr bool fine = sizeof(typename Student::Bits) == 4;
};

// Of the lanes' sums, which are measured from exponents of 2: e_s = 2^(s k_s - max_s). With max_s on a grid, one FMA
// gives that exponent with one rounding, and moving a sum to another max_s is exact.
template <Hard hard>
struct LaneScales {
    float s, t;  // k_s, k_t: log2(e) over each temperature; for the hard term alone, log2(e)
    float natural;  // 1 / tau
    float to_hard;  // from exponents of e_s to those of exp(s)

    FKD_GPU_MEMBER LaneScales(float s, float t, float natural)
        : s(s), t(t), natural(natural), to_hard(static_cast<float>(kLog2E) / s) {}

    // The exponent of 2 that exp(s) is measured from.
    FKD_GPU_MEMBER float hard_point(float max_s) const {
        if (hard == Hard::same) return max_s;
        if (hard == Hard::square) return 2 * max_s;
        return to_grid(max_s * to_hard);
    }
};

// Of a lane's sums where it goes carefully: natural logits, the teacher's without the factor that its own temperature
// is. Scaled as they are, large ones would lose digits.
struct CarefulScales : Scales {
    float factor;

    FKD_GPU_MEMBER CarefulScales(double temperature, float factor) : Scales(temperature), factor(factor) {}

    FKD_GPU_MEMBER float teacher_distance(float from, float to) const { return (from - to) * factor; }
    FKD_GPU_MEMBER bool scaled() const { return factor != 1; }
};

// A section's piece of a row, in memory.
struct Piece {
    double max_s, max_t;
    float z_s, z_t, b1, b2, excess, h, rest, z_1, sum;
};

struct Work {
    FkdRows student, teacher, gradient;
    const int64_t* targets;
    float *soft, *hard, *stats;
    const float *grad_soft, *grad_hard;
    Piece* pieces;        // [rows, sections] where blocks share a row, else null
    void* terms;          // [rows, sections] of a second sweep: TermSums<float>, Moments<float> of LogitMSE, RestSum
    int64_t rows, columns;
    int sections, slices;  // of a row: slices are what blocks take
    bool forward, backward, whole;  // whole: a block has a row to itself and finishes it

    bool use_soft, use_hard, entropy, tempered;
    float k_s, k_t, unit, temperature, teacher_factor, smoothing;
    int64_t divergence;
    FamilyNumbers numbers;
    RestScale rest;
};

// Of whole rows, in float64: of the factors that lanes use, not of better ones.
struct RowScales {
    double log2, unit;
    bool exchanged = false;

    // In one column both probabilities are 1, whatever the last bit says.
    FKD_GPU_MEMBER explicit RowScales(const Work& w) : log2(w.k_s), unit(w.columns == 1 ? 0 : w.unit) {}

    FKD_GPU_MEMBER double hard_exponent(double from, double to) const { return (from - to) * kLog2E; }
    FKD_GPU_MEMBER double teacher_distance(double from, double to) const { return from - to; }
    FKD_GPU_MEMBER bool scaled() const { return false; }
};

// A teacher's dtype that is known as the kernel runs.
struct AnyDtype {};

// Some of a row's logits, of a dtype that the compiler knows, or not.
template <class Dtype>
struct Logits {
    const typename Dtype::Bits* at = nullptr;
    int past = 0;  // bytes from `at` to the first column, for `load`

    FKD_GPU_MEMBER Logits() {}
    FKD_GPU_MEMBER Logits(const FkdRows& rows, int64_t row)
        : at(static_cast<const typename Dtype::Bits*>(rows.data) + row_offset(rows, row)) {}
    FKD_GPU_MEMBER void advance(int64_t columns) { at += columns; }
    FKD_GPU_MEMBER bool aligned() const { return bytes_past(at) == 0; }
    // To the multiple of 16 bytes there or before it: ahead of the row perhaps, but not of its memory, which begins at
    // one.
    FKD_GPU_MEMBER void round_down() {
        past = bytes_past(at);
        at -= past / static_cast<int>(sizeof(*at));
    }
    FKD_GPU_MEMBER float operator[](int column) const { return Dtype::widened(at[column]); }
    template <bool shifted>
    FKD_GPU_MEMBER void load(int column, float* out) const {
        load_group<shifted>(Dtype(), at + column, past, out);
    }
};

template <>
struct Logits<AnyDtype> {
    const char* at = nullptr;
    int past = 0, dtype = FKD_FLOAT32, size = 4;

    FKD_GPU_MEMBER Logits() {}
    FKD_GPU_MEMBER Logits(const FkdRows& rows, int64_t row)
        : dtype(static_cast<int>(rows.dtype)), size(dtype == FKD_FLOAT32 ? 4 : 2) {
        at = static_cast<const char*>(rows.data) + row_offset(rows, row) * size;
    }
    FKD_GPU_MEMBER void advance(int64_t columns) { at += columns * size; }
    FKD_GPU_MEMBER bool aligned() const { return bytes_past(at) == 0; }
    FKD_GPU_MEMBER void round_down() {
        past = bytes_past(at);
        at -= past;
    }
    FKD_GPU_MEMBER float operator[](int column) const {
        if (dtype == FKD_FLOAT32) return reinterpret_cast<const float*>(at)[column];
        const uint16_t bits = reinterpret_cast<const uint16_t*>(at)[column];
        return dtype == FKD_BFLOAT16 ? Bfloat16::widened(bits) : widened_half(bits);
    }
    template <bool shifted>
    FKD_GPU_MEMBER void load(int column, float* out) const {
        if (dtype == FKD_FLOAT32)
            return load_group<shifted>(Float32(), reinterpret_cast<const float*>(at) + column, past, out);
        const uint16_t* from = reinterpret_cast<const uint16_t*>(at) + column;
        if (dtype == FKD_BFLOAT16) return load_group<shifted>(Bfloat16(), from, past, out);
        load_group<shifted>(Float16(), from, past, out);
    }
};

// A row, or a section of one: its columns are counted from the section's first.
template <class V>
struct RowView {
    Logits<typename V::Student> student;
    Logits<typename V::Teacher> teacher;

    FKD_GPU_MEMBER RowView(const Work& w, int64_t row) : student(w.student, row) {
        if (V::soft) teacher = Logits<typename V::Teacher>(w.teacher, row);
    }
    FKD_GPU_MEMBER RowView from(int64_t column) const {
        RowView section = *this;
        section.student.advance(column);
        if (V::soft) section.teacher.advance(column);
        return section;
    }
    FKD_GPU_MEMBER bool aligned() const { return student.aligned() && (!V::soft || teacher.aligned()); }
    FKD_GPU_MEMBER void round_down() {
        student.round_down();
        if (V::soft) teacher.round_down();
    }
    FKD_GPU_MEMBER float s(int column) const { return student[column]; }
    FKD_GPU_MEMBER float t(int column) const { return V::soft ? teacher[column] : 0.0f; }
};

// Where a section lies in its row, and where the label lies in the section, or -1. What is `ahead` of the sections is
// the first one's.
struct Range {
    int64_t begin, left;  // left: from there to the row's end
    int n, label;

    FKD_GPU_MEMBER Range(const Work& w, int section, int64_t target, int ahead = 0)
        : begin(section == 0 ? 0 : ahead + static_cast<int64_t>(section) * kSection), left(w.columns - begin) {
        const int most = section == 0 ? ahead + kSection : kSection;
        n = static_cast<int>(left < 0 ? 0 : left < most ? left : most);
        // Without a sign: a target may be the least number there is.
        const uint64_t at = static_cast<uint64_t>(target) - static_cast<uint64_t>(begin);
        label = w.use_hard && target >= 0 && at < static_cast<uint64_t>(n) ? static_cast<int>(at) : -1;
    }
    // Whether shifted loads of the columns before this one read nothing behind the row.
    FKD_GPU_MEMBER bool shifts_until(int column) const { return left - column >= kGroup; }
};

// A row that is not read is skipped, or its label is out of range: then it is NaN.
FKD_GPU float unread_value(int64_t target) { return target == FKD_SKIP ? 0.0f : NAN; }

}  // namespace fused_kd
