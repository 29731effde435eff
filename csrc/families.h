// The families that divergences belong to: what a column adds to the value and to the gradient. fused_kd/families.py
// derives it, and fits the polynomials.
#pragma once
#include "fused_kd.h"
#include "row_math.h"

namespace fused_kd {

// FkdLoss::numbers of a family.
struct FamilyNumbers {
    float parameter[3];
    float reach;  // below this |d| a column is near
    float of_value[6], of_gradient[6];

    FamilyNumbers() = default;
    FKD_MEMBER explicit FamilyNumbers(const double* x) {
        for (int i = 0; i < 3; ++i) parameter[i] = static_cast<float>(x[i]);
        reach = static_cast<float>(x[3]);
        for (int i = 0; i < 6; ++i) of_value[i] = static_cast<float>(x[4 + i]);
        for (int i = 0; i < 6; ++i) of_gradient[i] = static_cast<float>(x[10 + i]);
    }
};

// The sums of a row, their logarithms, and these in two parts: 1 / Z = 2^-grid fine.
struct RowSums {
    float z_s, per_z_s, per_z_t, log2_z_s, log2_z_t, grid_s, grid_t, fine_s, fine_t;

    FKD_MATH RowSums of(float z_s, float z_t, bool logarithms) {
        RowSums r = {};
        r.z_s = z_s;
        r.per_z_s = 1 / z_s;
        r.per_z_t = 1 / z_t;
        if (!logarithms) return r;
        r.log2_z_s = std::log2(z_s);
        r.log2_z_t = std::log2(z_t);
        r.grid_s = rounded(r.log2_z_s);
        r.grid_t = rounded(r.log2_z_t);
        r.fine_s = static_cast<float>(std::exp2(static_cast<double>(r.grid_s)) / z_s);
        r.fine_t = static_cast<float>(std::exp2(static_cast<double>(r.grid_t)) / z_t);
        return r;
    }

  private:
    // So that x - grid is rounded once. Of p and q the larger may be taken for the other where they are this near.
    FKD_MATH float rounded(float log2_z) { return std::nearbyint(log2_z * 262144) / 262144; }
};

// What a column has of them: of the value, of the gradient (c), and q.
struct Terms {
    float v, c, q;
};

FKD_MATH float times(float x, float y) { return x == 0 ? 0.0f : x * y; }  // 0 log 0 = 0

// y = 2^e (1 + f) with |f| <= 1/3: 2^23 e, as y's bits have it; e; and log(1 + f).
FKD_MATH uint32_t exponent_bits(uint32_t bits) { return (bits - 0x3f2aaaabu) & 0xff800000u; }
FKD_MATH float exponent_of(float y) {
    uint32_t bits;
    std::memcpy(&bits, &y, 4);
    return static_cast<float>(static_cast<int32_t>(exponent_bits(bits))) * 1.1920929e-7f;
}
FKD_MATH float log_of_fraction(float y) {
    uint32_t bits;
    std::memcpy(&bits, &y, 4);
    bits -= exponent_bits(bits);
    float f;
    std::memcpy(&f, &bits, 4);
    f -= 1.0f;
    // Least relative error of log(1 + f) / f there, in pairs: the next column need not wait for a long chain.
    const float f2 = f * f, f4 = f2 * f2;
    const float low = (1.0f - 0.49999931f * f) + (0.33333164f - 0.25008184f * f) * f2;
    const float high = (0.20012178f - 0.16409411f * f) + (0.13983686f - 0.15423422f * f) * f2;
    const float r = low + (high + 0.14076719f * f4) * f4;
    return f * r;
}

// log(1 + x) of -1 < x <= 0, where y = 1 + x as it rounds.
FKD_MATH float log1p_of(float x, float y) {
    const float lost = (x - (y - 1.0f)) * (2.0f - y);  // what y lost, over y
    return exponent_of(y) * static_cast<float>(kLn2) + (log_of_fraction(y) + lost);
}

// v and c as they are given where the column is not near, else from the polynomials.
template <int degree>
FKD_MATH Terms nearer(const FamilyNumbers& n, float base, float d, float v, float c, float q) {
    float of_value = n.of_value[degree], of_gradient = n.of_gradient[degree];
    for (int i = degree - 1; i >= 0; --i) {
        of_value = n.of_value[i] + d * of_value;
        of_gradient = n.of_gradient[i] + d * of_gradient;
    }
    const bool near = std::fabs(d) < n.reach;
    const float linear = base * d;
    return {near ? linear * d * of_value : v, near ? linear * of_gradient : c, q};
}

// A family is a struct with one function: the terms of a column with e_s = 2^x_s, e_t = 2^x_t and d = log q - log p. x_s
// and x_t may be -inf, and d infinite, or NaN where both are. (A struct of the three would keep GCC 12 from vectorising.)

// forward KL(p || q) + (1 - forward) KL(q || p).
struct Linear {
    FKD_MATH Terms terms(const FamilyNumbers& n, const RowSums& z, float x_s, float x_t, float d) {
        const float forward = n.parameter[0];
        const float p = exp2_of(x_t) * z.per_z_t, q = exp2_of(x_s) * z.per_z_s, difference = q - p;
        const float reverse = times((1 - forward) * q, d);
        const float v = reverse - times(forward * p, d) + (2 * forward - 1) * difference;
        return nearer<4>(n, p, d, v, forward * difference + reverse, q);
    }
};

// of_p KL(p || m) + of_q KL(q || m), m = share p + (1 - share) q. `skewed`: the two do not balance.
template <bool skewed>
struct Mixture {
    FKD_MATH Terms terms(const FamilyNumbers& n, const RowSums& z, float x_s, float x_t, float d) {
        const float share = n.parameter[0], of_p = n.parameter[1], of_q = n.parameter[2];
        float magnitude = std::fabs(d);
        magnitude = magnitude < 1e30f ? magnitude : 1e30f;  // 0 log 0 = 0, also where both are 0
        // Of two things one, by arithmetic: of a choice GCC 12 makes a branch, and repeats what follows in both.
        const float more_q = static_cast<float>(d > 0), above = more_q * magnitude, below = above - magnitude;
        const float log2_p = x_t - z.grid_t, log2_q = x_s - z.grid_s;  // but for the fine factors
        const float larger = exp2_of(log2_p > log2_q ? log2_p : log2_q) * (z.fine_t + more_q * (z.fine_s - z.fine_t));
        const float less = 1 - exp2_of(-magnitude * static_cast<float>(kLog2E));  // smaller / larger = 1 - less
        const float p = larger * (1 - more_q * less), q = larger * (1 - less + more_q * less);
        const float x = -less * (1 - share + more_q * (2 * share - 1)), w = 1 + x;  // w = m / larger
        const float log_w = log1p_of(x, w);
        const float p_term = of_p * p * (-above - log_w), q_term = of_q * q * (below - log_w);
        if (!skewed) return nearer<5>(n, p, d, p_term + q_term, q_term, q);
        const float level = of_p * (1 - share) - of_q * share;
        return nearer<5>(n, p, d, p_term + q_term + level * (q - p), q_term + level * (q - larger * (1 - less) / w), q);
    }
};

// The same for a row whose student is far: no column counts as near, since what one rounds off does not show in such
// sums, and d is not looked at. The logarithms of p and q are their exponents; only that of m has to be taken.
template <bool skewed>
struct FarMixture {
    FKD_MATH Terms terms(const FamilyNumbers& n, const RowSums& z, float x_s, float x_t, float) {
        const float share = n.parameter[0], of_p = n.parameter[1], of_q = n.parameter[2];
        const float log2_p = x_t - z.log2_z_t, log2_q = x_s - z.log2_z_s;
        const float p = exp2_of(log2_p), q = exp2_of(log2_q);
        const float m = share * p + ((1 - share) * q + 1e-37f);  // not 0 where both are
        const float p_term = of_p * p * above(log2_p, m), q_term = of_q * q * above(log2_q, m);
        if (!skewed) return {p_term + q_term, q_term, q};
        const float level = of_p * (1 - share) - of_q * share;
        return {p_term + q_term + level * (q - p), q_term + level * (q - p * q / m), q};
    }

  private:
    // log(2^log2_p / m), and 0 where 2^log2_p counts as 0. The exponents' difference is exact.
    FKD_MATH float above(float log2_p, float m) {
        const float log_ratio = (log2_p - exponent_of(m)) * static_cast<float>(kLn2) - log_of_fraction(m);
        uint32_t bits;
        std::memcpy(&bits, &log_ratio, 4);
        bits &= 0u - static_cast<uint32_t>(log2_p >= kFlush);
        float y;
        std::memcpy(&y, &bits, 4);
        return y;
    }
};

// -1 / (a b) sum (p^a q^b - (a p^k + b q^k) / k), k = a + b. A power of p or q may count where they are too small for
// float32.
struct AlphaBeta {
    FKD_MATH Terms terms(const FamilyNumbers& n, const RowSums& z, float x_s, float x_t, float d) {
        const float a = n.parameter[0], b = n.parameter[1], k = a + b, per_a = 1 / a, per_b = 1 / b, per_k = 1 / k;
        const float log2_p = x_t - z.log2_z_t, log2_q = x_s - z.log2_z_s;
        const float of_p = exp2_of(k * log2_p), of_q = exp2_of(k * log2_q), both = exp2_of(a * log2_p + b * log2_q);
        const float v_p = above(of_p, both, -b * d) * per_b, v_q = above(of_q, both, a * d) * per_a;
        return nearer<5>(n, both, d, (v_p + v_q) * per_k, v_q, exp2_of(x_s) * z.per_z_s);
    }

  private:
    // power - both, where power = both exp(log_ratio).
    FKD_MATH float above(float power, float both, float log_ratio) {
        const float near = both * (log_ratio + log_ratio * phi_over_delta(log_ratio));
        return std::fabs(log_ratio) < kSmallPhi ? near : power - both;
    }
};

// sum |p - q| / 2.
struct Variation {
    FKD_MATH Terms terms(const FamilyNumbers&, const RowSums& z, float x_s, float x_t, float d) {
        const float p = exp2_of(x_t) * z.per_z_t, q = exp2_of(x_s) * z.per_z_s, half = 0.5f * q;
        return {0.5f * std::fabs(probability_difference(q, p, d)), d > 0 ? half : d < 0 ? -half : 0.0f, q};
    }
};

// What a finished row's gradient needs.
struct Finished {
    RowSums sums;
    float log_ratio, growth, top;  // FkdStat

    // Logarithms are the families' affair.
    FKD_MATH Finished of(const float* stats, bool logarithms) {
        return {RowSums::of(stats[FKD_STUDENT_SUM], stats[FKD_TEACHER_SUM], logarithms), stats[FKD_LOG_RATIO],
                stats[FKD_GROWTH], stats[FKD_TOP]};
    }
};

// The soft term's gradient at a column, times tau; and q, of which the hard term's may be a power.
struct Slope {
    float soft, q;
};
// delta = log(e_s / e_t), and difference = s / tau - t / tau_t.
template <class Family>
struct SlopeOf {
    FKD_MATH Slope at(float x_s, float x_t, float delta, float, const Finished& row, const FamilyNumbers& n) {
        const Terms part = Family::terms(n, row.sums, x_s, x_t, delta - row.log_ratio);
        return {part.q > 0.5f ? row.top : part.c - part.q * row.growth, part.q};
    }
};
struct ReverseKL {};
template <>
struct SlopeOf<ReverseKL> {
    FKD_MATH Slope at(float x_s, float, float delta, float, const Finished& row, const FamilyNumbers&) {
        const float q = exp2_of(x_s) * row.sums.per_z_s;
        return {times(q, delta) + q * row.top, q};
    }
};
struct LogitMSE {};
template <>
struct SlopeOf<LogitMSE> {
    FKD_MATH Slope at(float x_s, float x_t, float, float difference, const Finished& row, const FamilyNumbers&) {
        const bool counts = (x_s != -INFINITY) & (x_t != -INFINITY);
        return {counts ? (difference - row.growth) * row.top : 0.0f, 0};
    }
};

// Of columns of a row. In a column with more than half of q, c - q G is a small difference of large numbers, which the
// other columns have: c - q G = rest_q G - rest_c.
template <class Real>
struct TermSums {
    Real v = 0, c = 0;
    Real rest_c = 0, rest_q = 0;  // over the columns with q <= 1/2

    template <class Other>
    FKD_MEMBER void operator+=(const TermSums<Other>& x) {
        v += x.v;
        c += x.c;
        rest_c += x.rest_c;
        rest_q += x.rest_q;
    }
    FKD_MEMBER Real growth() const { return c - c == 0 ? c : static_cast<Real>(NAN); }
    FKD_MEMBER Real top() const { return growth() * rest_q - rest_c; }
};

// Differences of logits over the columns that are finite in both, for LogitMSE; merged as Chan, Golub and LeVeque do.
template <class Real>
struct Moments {
    Real count = 0, mean = 0, squares = 0;  // squares: the sum of (x - mean)^2

    template <class Other>
    FKD_MEMBER void operator+=(const Moments<Other>& x) {
        if (x.count == 0) return;
        const Real all = count + x.count, apart = x.mean - mean;
        squares += x.squares + apart * apart * (count * x.count / all);
        mean += apart * (x.count / all);
        count = all;
    }
};

// LogitMSE's value of a row, and its stats. Of one column nothing is left once its mean is taken off, whatever the last
// bit says.
FKD_MATH double mean_squares(const Moments<double>& m, bool centred, float* stats) {
    const double growth = centred ? m.mean : 0, rest = m.mean - growth;
    stats[FKD_GROWTH] = static_cast<float>(growth);
    stats[FKD_TOP] = static_cast<float>(centred && m.count == 1 ? 0 : 1 / m.count);
    return (m.squares / m.count + rest * rest) / 2;
}

}  // namespace fused_kd
