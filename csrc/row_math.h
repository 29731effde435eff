// The mathematics of one row, once, for every native backend. docs/design.md derives it.
//
//   x = s / tau,  w = t / tau,  m = max of a piece of the row,  p = softmax(w),  q = softmax(x)
//   e_s = exp(x - m_x),  e_t = exp(w - m_w),  delta = (x - m_x) - (w - m_w),  so e_s = e_t exp(delta)
//
// KL(p||q) is a small difference of large numbers once the student is close. Two sums keep it exact:
//
//   B1 = sum e_t delta,   B2 = sum e_t phi(delta),   phi(delta) = exp(delta) - 1 - delta >= 0
//   X = (B1 + B2) / Z_t = Z_s / Z_t - 1,   KL = log1p(X) - X + B2 / Z_t = log(Z_s / Z_t) - B1 / Z_t
//
// X keeps log(Z_s / Z_t) exact. Its numerator is a sum of its own, of e_s - e_t: B1 and B2 may be large and cancel.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

// FKD_MATH: a function, or a static member; FKD_MEMBER: any other member.
#if defined(__CUDACC__)
#define FKD_MEMBER __host__ __device__ __forceinline__
#define FKD_MATH static FKD_MEMBER
#elif defined(__GNUC__)
#define FKD_MATH static inline __attribute__((always_inline))
#else
#define FKD_MATH static inline
#endif
#if !defined(FKD_MEMBER)
#define FKD_MEMBER
#endif

namespace fused_kd {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr float kLowest = -3.402823466e38f;

// Below this exponent of 2 an exponential is 0: a p or q that float32 cannot hold counts as 0.
constexpr float kFlush = -126.0f;
// Below these |delta| a polynomial is used, above them the difference of two exponentials: for q - p, and for
// phi(delta), which that difference knows less of (logits of 16 bits often differ by exactly 1/8).
constexpr float kSmall = 0.125f, kSmallPhi = 0.2f;

// 2^x for x <= 60: exactly 1 at 0, exactly 0 below kFlush, relative error below 2e-7. NaN may come out as anything:
// a row with a NaN is recognised by its maximum.
FKD_MATH float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const float shifted = x + magic;
    const float f = x - (shifted - magic);
    float p = 1.3264727e-3f;  // minimax of 2^f on [-1/2, 1/2]
    p = p * f + 9.671513e-3f;
    p = p * f + 5.5507336e-2f;
    p = p * f + 0.24022242f;
    p = p * f + 0.693147f;
    p = p * f + 1.0f;
    uint32_t bits, exponent;
    std::memcpy(&bits, &p, 4);
    std::memcpy(&exponent, &shifted, 4);
    // A mask, not a choice: a compiler that sees a branch repeats what follows for its zero.
    bits = (bits + (exponent << 23)) & (0u - static_cast<uint32_t>(x >= kFlush));
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
#endif
}

// phi(delta) / delta for |delta| < kSmallPhi, within 6e-7 of itself.
FKD_MATH float phi_over_delta(float d) {
    return d * (0.49999973f + d * (0.16666679f + d * (0.041722234f + d * 0.0083359778f)));
}

// What the temperature makes of a logit. The teacher's own temperature is a factor tau / tau_t on its logits, so here
// there is one temperature.
struct Scales {
    float log2;  // log2(e) / tau
    float unit;  // 1 / tau

    FKD_MEMBER explicit Scales(double temperature)
        : log2(static_cast<float>(kLog2E / temperature)), unit(static_cast<float>(1 / temperature)) {}

    // How far two points that teacher's sums are measured from are apart.
    template <class Real>
    FKD_MEMBER Real teacher_distance(Real from, Real to) const {
        return from - to;
    }
    FKD_MEMBER bool scaled() const { return false; }
    // Whether student and teacher are exchanged in the sums, as for reverse KL.
    bool exchanged = false;
    // The exponent of 2 by which exp(s - from) and exp(s - to) differ.
    template <class Real>
    FKD_MEMBER Real hard_exponent(Real from, Real to) const {
        return (from - to) * static_cast<Real>(kLog2E);
    }
};

FKD_MATH float to_grid(float x) { return std::nearbyint(x * 256) / 256; }
FKD_MATH float on_grid(float x) { return std::fabs(x) < 32768 ? to_grid(x) : x; }

// The point that a piece of a row is measured from, and how (s - student) - (t - teacher) is taken without rounding
// where the student is close. What lies between the points, on a grid, goes off the one of s and t farther from 0: that
// is exact, and leaves close numbers, whose difference is exact too. `then` is what this makes of the points themselves,
// so that delta is 0 there.
struct Centre {
    float student = 0, teacher = 0;
    float apart = 0, then = 0;

    FKD_MATH Centre of(float student, float teacher) {
        Centre m;
        m.student = student;
        m.teacher = teacher;
        m.apart = on_grid(student - teacher);
        m.then = m.difference(student, teacher);
        return m;
    }
    FKD_MEMBER float difference(float s, float t) const {
        const float positive = apart > 0 ? apart : 0;
        const float off_s = t > apart * -0.5f ? positive : apart - positive;  // where s = t + apart is farther, or nothing
        return ((s - off_s) - (t + (apart - off_s))) - then;
    }
};

// Of some of a block's columns: the mean of s - t, weighted by e_t; the sum of e_t that the block must have; and the
// variance of s - t.
struct Sample {
    float difference, mass, variance;

    FKD_MEMBER bool spread() const { return mass > 2; }
};

// Where Z_t, measured from a block's largest teacher logit, is no more than this, one column has most of p there.
constexpr float kSure = 1.25f;
// A typical difference this near to that of the maxima is theirs: a sample knows it no better, and from the maxima delta
// is exactly 0 at all columns that are as far apart.
constexpr float kAlike = 1.0f / 128;

// The centre of a block with these maxima, so that delta is small for what most of p lies on. Where one token has it
// all, that is the maxima (delta is exactly 0 there); else the typical difference, which a single logit that sticks
// out does not move, unless exponentials from there would leave float32's range.
FKD_MATH Centre centre_of(float max_s, float max_t, const Sample& sample, const Scales& k) {
    const float student = max_t + sample.difference;
    const float reach = 60 / (k.log2 > static_cast<float>(kLog2E) ? k.log2 : static_cast<float>(kLog2E));
    const bool typical = std::fabs(sample.difference - (max_s - max_t)) * k.unit < kAlike;
    const bool spread = sample.spread() && !typical && std::fabs(max_s - student) <= reach;
    return spread ? Centre::of(student, max_t) : Centre::of(max_s, max_t);
}

// How exp(s - max) follows from e_s = exp((s - max) / tau): a power of it, or an exponential of its own.
enum class Hard { off, same, square, exponential };

// exp(s - max), at temperature 1.
template <Hard hard>
FKD_MATH float hard_exponential(float e_s, float s, float student_max) {
    if (hard == Hard::same) return e_s;
    if (hard == Hard::square) return e_s * e_s;
    return exp2_of((s - student_max) * static_cast<float>(kLog2E));
}

struct Pair {
    float e_s, e_t, delta;
    float x_t;  // e_t = 2^x_t
};

// `fine` logits are float32: those of 16 bits are never so close that what s - t is rounded by would show.
template <bool fine = true>
FKD_MATH Pair exponentials(float s, float t, const Centre& m, const Scales& k) {
    Pair r;
    r.x_t = (t - m.teacher) * k.log2;
    r.e_s = exp2_of((s - m.student) * k.log2);
    r.e_t = exp2_of(r.x_t);
    r.delta = (fine ? m.difference(s, t) : (s - t) - (m.student - m.teacher)) * k.unit;
    return r;
}

// One column's share of B1 and B2, and e_s - e_t without cancellation.
struct Share {
    float b1, b2, excess;
};

// `plain` is e_s - e_t as it comes, `counts` whether e_t > 0. (Scalars, not a Pair: GCC 12 does not vectorise a loop that
// takes the address of a struct of its own.)
FKD_MATH Share share(float plain, float e_t, float delta, bool counts) {
    const float b1 = counts ? e_t * delta : 0.0f;  // 0 log 0 = 0; -inf student: -inf
    const bool small = std::fabs(delta) < kSmallPhi;
    const float b2 = small ? b1 * phi_over_delta(delta) : plain - b1;
    return {b1, b2, small ? b1 + b2 : plain};
}

// q - p from q, p, both times any factor, and log(q / p), without cancellation: (q + p) tanh(log_ratio / 2).
FKD_MATH float probability_difference(float q, float p, float log_ratio) {
    const float half_tanh = log_ratio * (0.5f - log_ratio * log_ratio * 0.0416128f);  // within 4e-7 below kSmall
    return std::fabs(log_ratio) < kSmall ? (q + p) * half_tanh : q - p;
}

// A piece of a row. Pieces merge associatively, whatever maxima they were measured from.
template <class Real>
struct Partial {
    Real max_s = kLowest, max_t = kLowest;  // its centre
    Real z_s = 0, z_t = 0;    // sums of e_s, e_t
    Real b1 = 0, b2 = 0;
    Real excess = 0;          // B1 + B2 = Z_s - Z_t, summed by itself: the two may be large and cancel
    Real h = 0;               // sum of e_t log2(e_t), for the teacher's entropy
    Real rest = 0;            // and of e_t over the columns that do not lie at max_t: beside 1, a sum would lose it
    Real z_1 = 0;             // sum of exp(s - max_s) over the columns other than the label
    Real sum = 0;             // sum of s, for label smoothing
};

template <class Real>
FKD_MATH Real larger(Real a, Real b) { return a > b ? a : b; }

FKD_MATH double power_of_2(double x) { return std::exp2(x); }
FKD_MATH float power_of_2(float x) { return exp2_of(x); }

// What two factors r_s = r_t exp(d) differ by, and what remains of that without its linear part: r_t phi(d).
template <class Real>
struct Apart {
    Real excess, bend;
};
FKD_MATH Apart<double> apart_by(double r_s, double r_t, double d) {
    const double excess = std::fabs(d) < 1 ? r_t * std::expm1(d) : r_s - r_t;
    return {excess, excess - r_t * d};
}
FKD_MATH Apart<float> apart_by(float r_s, float r_t, float d) {
    const float plain = r_s - r_t, linear = r_t * d, bend = linear * phi_over_delta(d);
    const bool small = std::fabs(d) < kSmallPhi;
    return {small ? linear + bend : plain, small ? bend : plain - linear};
}

// Moves a piece to another centre, on which e_s, e_t and exp(s) become 2^down_s, 2^down_t and 2^down_1 of themselves.
// delta grows by d, their logarithms' difference; every product below is bounded however far apart the two scales are.
// Not `last`: a lane's, which is one of many and will be moved again.
template <class Real>
FKD_MATH Partial<Real> moved_by(const Partial<Real>& a, Real down_s, Real down_t, Real down_1, Real d,
                                bool last = true) {
    const Real r_s = power_of_2(down_s), r_t = power_of_2(down_t);
    const Apart<Real> apart = apart_by(r_s, r_t, d);
    Partial<Real> r;
    r.z_s = r_s * a.z_s;
    r.z_t = r_t * a.z_t;
    if (r_t > 0) {
        r.b1 = r_t * (a.b1 + d * a.z_t);
        r.b2 = apart.bend * a.z_t + apart.excess * a.b1 + r_s * a.b2;
        r.excess = apart.excess * a.z_t + r_s * a.excess;
        r.h = r_t * (a.h + down_t * a.z_t);
        r.rest = down_t == 0 ? a.rest : r_t * a.z_t;
        if (last && a.b2 > a.z_s) {  // far from the teacher those terms cancel; what they leave is in Z_s and Z_t
            r.excess = r.z_s - r.z_t;
            r.b2 = r.excess - r.b1;
        }
    } else {
        r.b2 = r.excess = r.z_s;  // no teacher left here: phi has become exp
    }
    r.z_1 = a.z_1 == 0 ? a.z_1 : a.z_1 * power_of_2(down_1);
    r.sum = a.sum;
    return r;
}

// How far the points of a piece are apart, measured from others, without rounding where student and teacher are close.
FKD_MATH float apart_from(float own_s, float own_t, float s, float t) { return Centre::of(s, t).difference(own_s, own_t); }
FKD_MATH double apart_from(double own_s, double own_t, double s, double t) { return (own_s - s) - (own_t - t); }

// To maxima at least as large as its own.
template <class Real, class Scale>
FKD_MATH Partial<Real> moved(const Partial<Real>& a, Real max_s, Real max_t, const Scale& k) {
    const Real down_s = a.max_s - max_s, down_t = k.teacher_distance(a.max_t, max_t);
    const Real down_1 = k.exchanged ? k.hard_exponent(a.max_t, max_t) : k.hard_exponent(a.max_s, max_s);
    const Real apart = k.scaled() ? down_s - down_t : apart_from(a.max_s, a.max_t, max_s, max_t);
    Partial<Real> r = moved_by(a, down_s * k.log2, down_t * k.log2, down_1, apart * k.unit);
    r.max_s = max_s;
    r.max_t = max_t;
    return r;
}

// Two pieces measured from the same maxima, as one.
template <class Real>
FKD_MATH Partial<Real> added(const Partial<Real>& l, const Partial<Real>& r) {
    Partial<Real> c;
    c.max_s = l.max_s;
    c.max_t = l.max_t;
    c.z_s = l.z_s + r.z_s;
    c.z_t = l.z_t + r.z_t;
    c.b1 = l.b1 + r.b1;
    c.b2 = l.b2 + r.b2;
    c.excess = l.excess + r.excess;
    c.h = l.h + r.h;
    c.rest = l.rest + r.rest;
    c.z_1 = l.z_1 + r.z_1;
    c.sum = l.sum + r.sum;
    return c;
}

template <class Real, class Scale>
FKD_MATH Partial<Real> merge(const Partial<Real>& a, const Partial<Real>& b, const Scale& k) {
    const Real max_s = larger(a.max_s, b.max_s), max_t = larger(a.max_t, b.max_t);
    const bool at_a = a.max_s == max_s && a.max_t == max_t, at_b = b.max_s == max_s && b.max_t == max_t;
    return added(at_a ? a : moved(a, max_s, max_t, k), at_b ? b : moved(b, max_s, max_t, k));
}

// What a finished row says.
template <class Real>
struct Row {
    Real kl = 0, log_ratio = 0;            // log_ratio = log(Z_s / Z_t)
    Real nll = 0, hard_sum = 0, miss = 0;  // miss = 1 - softmax(s)[label]
};

template <class Real>
FKD_MATH void finish_soft(const Partial<Real>& a, Row<Real>& row) {
    const Real x = a.excess / a.z_t, second = a.b2 / a.z_t;
    // Close to the teacher B1 and B2 are small and carry the value; far from it they are large and cancel.
    const bool close = std::fabs(x) + second < 1;
    row.log_ratio = close ? std::log1p(x) : std::log(a.z_s / a.z_t);
    const Real kl = row.log_ratio + (close ? second - x : -a.b1 / a.z_t);
    row.kl = kl < 0 ? Real(0) : kl;
    if (a.z_s == 0 || a.z_t == 0) row.kl = row.log_ratio = NAN;  // a row of -inf
}

// -sum p log p. Of a sure teacher it is what Z_t has beside 1, so log(Z_t) comes from the sum that leaves out the columns
// at max_t, where e_t = 1, and their number: 0 where max_t is no column's logit.
template <class Real>
FKD_MATH Real teacher_entropy(const Partial<Real>& a) {
    const Real at_max = std::nearbyint(a.z_t - a.rest);
    return std::log1p(a.rest + (at_max - 1)) - a.h / a.z_t * static_cast<Real>(kLn2);
}

// -log softmax(s)[label] from the other columns' sum: a sure and right student keeps its digits.
template <class Real>
FKD_MATH void finish_hard(const Partial<Real>& a, Real student_max, Real label_logit, Row<Real>& row) {
    const Real below = student_max - label_logit;
    const Real own = std::exp2(-below * static_cast<Real>(kLog2E));
    row.hard_sum = a.z_1 + own;
    row.miss = a.z_1 / row.hard_sum;
    row.nll = below < 30 ? std::log1p(a.z_1 / own) : below + std::log(row.hard_sum);
    if (row.hard_sum == 0) row.nll = row.miss = NAN;  // a row of -inf
}

// The hard term's value with label smoothing; `sum` is that of all logits.
template <class Real>
FKD_MATH Real smoothed(Real nll, Real label_logit, Real sum, int64_t columns, Real smoothing) {
    if (!(smoothing > 0) || !(nll < INFINITY)) return nll;  // inf - inf would be no loss
    return nll + smoothing * (label_logit - sum / static_cast<Real>(columns));
}

}  // namespace fused_kd
