// Loops over one block of a row: up to kBlock adjacent columns, in L1 or L2. The arithmetic is float32 whatever the
// logits' dtype: a block is widened when it is read, and the gradient is narrowed as it is written.
#pragma once
#include "../families.h"
#include "../rest.h"

namespace fused_kd {

constexpr int kBlock = 4096;

// What the block after this one will touch, as streams side by side: the first byte of each, and its bytes a column.
constexpr int kStreams = 6;
struct Ahead {
    const char* at[kStreams];
    int size[kStreams];
};

// How far the student is. Far, float32 has enough of B2 in Z_s - Z_t - B1; near, what it rounds s - max and t - max by
// does not show in their difference; close, it does.
enum class Distance { far, near, close };

// They begin where B2 is this share of Z_t.
constexpr float kFar = 0.25f, kNear = 1.0f / 64;

// Sums over one block, measured from its centre.
struct BlockSums {
    float z_s, z_t, b1, b2, excess, z_1;

    void operator+=(const BlockSums& other) {
        z_s += other.z_s;
        z_t += other.z_t;
        b1 += other.b1;
        b2 += other.b2;
        excess += other.excess;
        z_1 += other.z_1;
    }
};

// For the teacher's entropy: as in Partial.
struct EntropySums {
    float h, rest;
};

// What the fused verb keeps of a block between its two visits, one float a column each.
struct Kept {
    float* excess;  // e_s - e_t
    float* e_t;
    float* e_1;     // exp(s - max_s); only for Hard::exponential and where the soft term is off
};

// g = excess * by_excess + e_t * by_e_t + e_1 * by_e_1 + constant
struct KeptFactors {
    float by_excess, by_e_t, by_e_1, constant;
};

// g = soft * (q - p) + hard * exp(s - max) + constant, with q = e_s per_z_s and p = e_t per_z_t.
struct GradientScales {
    Centre centre;
    float teacher_from;  // what is taken off the teacher's logits before they are scaled
    Finished row;
    float soft;
    float hard, constant;
    float at_label;  // the hard term's whole gradient at the label
    bool far;        // a mixture's row may take FarMixture
};

// Logits in their dtype (FkdDtype), to be widened as they are read; and where a gradient goes, rounded to its dtype.
struct Input {
    const void* data;
    int64_t dtype;
};
struct Output {
    void* data;
    int64_t dtype;
    bool past_caches = false;  // float32 that nobody reads soon: its memory need not be fetched before it is written
};

float block_maximum(const float* x, int n);  // kLowest for a block of -inf, NaN for a block with a NaN
double block_sum(const float* x, int n);
Sample block_sample(const float* s, const float* t, int n, float teacher_max, Scales k);
void block_scale(const float* x, int n, float from, float factor, float* out);  // (x - from) * factor
EntropySums block_entropy_sums(const float* t, int n, float teacher_max, const Scales& k);
float block_hard_sum(const float* s, int n, float student_max, float* e_1);  // e_1 may be null
// `exchanged`: s is the teacher's and t the student's, of which the hard term's sum is then.
// `guess`: how far it is likely to be, or less; `sure`: whether one column may have nearly all of p; kept may be null.
BlockSums block_sums(Hard hard, bool exchanged, const float* s, const float* t, int n, Centre m, const Scales& k,
                     Distance guess, bool sure, const Kept* kept, const Ahead& ahead);
// t has the dtype of s or is float32, and g the dtype of s.
void block_gradient(Hard hard, Input s, Input t, int n, const GradientScales& r, const Scales& k, Output g);
void block_hard_gradient(const float* s, int n, const GradientScales& r, Output g);
// Of a block whose row is finished, measured from r.centre; and of LogitMSE, measured from 0.
TermSums<float> block_term_sums(int64_t divergence, const float* s, const float* t, int n, const GradientScales& r,
                                const Scales& k, const FamilyNumbers& f, const Ahead& ahead);
Moments<float> block_moments(const float* s, const float* t, int n, const Scales& k, const Ahead& ahead);
// The gradient of what is neither forward KL nor cross entropy, as GradientScales has it. g may be s.
void block_other_gradient(int64_t divergence, Hard hard, const float* s, const float* t, int n, const GradientScales& r,
                          const Scales& k, const FamilyNumbers& f, float* g, const Ahead& ahead);
// FKD_REST.
struct RestSums {
    double z;
    float z_1;  // for Hard::same and Hard::square
};
// g = by exp((s - from) / tau) + by_1 e + constant, where e is a power of that exponential, or exp(s - student_max).
struct RestGradient {
    float from, log2, by, by_1, student_max, constant;
};
RestSums block_rest_sums(Hard hard, const float* s, int n, float from, const RestScale& k, const Ahead& ahead);
void block_rest_gradient(Hard hard, const float* s, int n, const RestGradient& r, float* g);  // g may be s
void finish_stores();  // what was written past the caches is there for other threads
void block_gradient_of_kept(Hard hard, const Kept& kept, int n, const KeptFactors& f, Output g);
void block_hard_gradient_of_kept(const Kept& kept, int n, const KeptFactors& f, Output g);

// 16-bit floats to float32, and one float32 to any dtype.
void widen(const void* x, int64_t dtype, int n, float* out);
void narrow(float x, Output out);
void narrow(const float* x, int n, Output out);

}  // namespace fused_kd
