// Loops over one block of a row: up to kBlock adjacent columns, all in L1. The arithmetic is float32 whatever the
// logits' dtype: a block is widened when it is read and narrowed when the gradient is written.
#pragma once
#include "../row_math.h"

namespace fused_kd {

constexpr int kBlock = 2048;

// Sums over one block, measured from its centre.
struct BlockSums {
    float z_s, z_t, b1, b2, z_1;
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
    Centre max;
    float per_z_s, per_z_t, log_ratio, soft;
    float hard, constant;
    float at_label;  // the hard term's whole gradient at the label
};

float block_maximum(const float* x, int n);  // kLowest for a block of -inf, NaN for a block with a NaN
float block_sum(const float* x, int n);
void block_scale(const float* x, int n, float factor, float* out);
float block_entropy_sum(const float* t, int n, float teacher_max, const Scales& k);  // sum of e_t log2(e_t)
float block_hard_sum(const float* s, int n, float student_max, float* e_1);  // e_1 may be null
BlockSums block_sums(Hard hard, const float* s, const float* t, int n, Centre m, const Scales& k, const Kept* kept);
void block_gradient(Hard hard, const float* s, const float* t, int n, const GradientScales& r, const Scales& k, float* g);
void block_hard_gradient(const float* s, int n, const GradientScales& r, float* g);
void block_gradient_of_kept(Hard hard, const Kept& kept, int n, const KeptFactors& f, float* g);
void block_hard_gradient_of_kept(const Kept& kept, int n, const KeptFactors& f, float* g);

// dtypes: bits of a 16-bit float to float32 and back, to nearest even.
void widen_bfloat16(const uint16_t* x, int n, float* out);
void widen_float16(const uint16_t* x, int n, float* out);
void narrow_bfloat16(const float* x, int n, uint16_t* out);
void narrow_float16(const float* x, int n, uint16_t* out);

}  // namespace fused_kd
