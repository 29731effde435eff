// The C interface of the native libraries: raw pointers, sizes, strides, dtype codes. No PyTorch header,
// so one build serves every version of torch and Python. fused_kd/native.py mirrors these structs.
#pragma once
#include <stdint.h>

#ifdef _WIN32
#define FKD_API extern "C" __declspec(dllexport)
#else
#define FKD_API extern "C" __attribute__((visibility("default")))
#endif

// Raised whenever a signature or a struct below changes; the Python side refuses any other number.
#define FKD_ABI_VERSION 4

enum FkdDtype { FKD_FLOAT32 = 0, FKD_BFLOAT16 = 1, FKD_FLOAT16 = 2, FKD_INT64 = 3 };
// FKD_REST, of fused_kd/backends/rows.py, takes ids (FKD_INT64) in place of the teacher's logits. Those from FKD_LINEAR
// on are the families of fused_kd/families.py, which take a second sweep over a row.
enum FkdDivergence {
    FKD_FORWARD_KL, FKD_CROSS_ENTROPY, FKD_REVERSE_KL, FKD_LOGIT_MSE, FKD_REST,
    FKD_LINEAR, FKD_MIXTURE, FKD_SKEWED_MIXTURE, FKD_ALPHA_BETA, FKD_VARIATION
};

// A target says what a row is for: a label in [0, V), or one of these. Everything else is out of range.
static const int64_t FKD_SKIP = -100;           // no term; the row is not read. PyTorch's default ignore_index
static const int64_t FKD_NO_LABEL = INT64_MIN;  // the soft term only

// What the gradient needs of a row: the columns of stats[N, FKD_STATS], float32.
enum FkdStat {
    FKD_STUDENT_MAX, FKD_TEACHER_MAX,  // the points that the sums are measured from: the maxima, or near them
    FKD_STUDENT_SUM,   // sum of exp((s - student_max) / tau)
    FKD_TEACHER_SUM,   // sum of exp((t - teacher_max) / tau_t)
    FKD_LOG_RATIO,     // log(student_sum / teacher_sum), with its small values intact
    FKD_HARD_SUM,      // sum of exp(s - student_max)
    FKD_MISS,          // 1 - softmax(s)[label], with its small values intact
    FKD_GROWTH, FKD_TOP,  // of other divergences: fused_kd/backends/rows.py
    FKD_STATS
};

#define FKD_TERMS 4
#define FKD_MAX_DIMS 8
#define FKD_NUMBERS 16

// Logits as rows of `columns` adjacent elements: row i starts at sum over d of index_d(i) * strides[d],
// with i counted in row-major order over sizes[0..dims). Strides are in elements and may be 0 or negative.
struct FkdRows {
    void* data;
    int64_t dtype;
    int64_t columns;
    int64_t dims;
    int64_t sizes[FKD_MAX_DIMS];
    int64_t strides[FKD_MAX_DIMS];
};

struct FkdLoss {
    double temperature, teacher_temperature, label_smoothing;
    int64_t divergence;     // FkdDivergence
    int64_t soft, hard;     // 0: that term is off, and what only it needs is neither read nor computed
    double numbers[FKD_NUMBERS];  // of a family: `kernel_numbers` of families.py; of FKD_LOGIT_MSE the first, `centred`
};

// The vocabulary is the columns that both have. Where the student has more, its gradient there is 0.
enum FkdResult { FKD_DONE = -1, FKD_OUT_OF_MEMORY = -2 };

// Each verb returns an FkdResult, or the first row whose target is out of range (nothing is written then).
FKD_API int64_t fkd_abi_version(void);
FKD_API int64_t fkd_rows_forward(const FkdRows* student, const FkdRows* teacher, const int64_t* targets,
                                 const FkdLoss* loss, float* soft, float* hard, float* stats, int64_t threads);
// The second sweep of a family by itself: what the columns add up to, sums[N, FKD_TERMS], for stats that may be those of
// longer rows, of which these are some columns. Of the CPU library alone.
FKD_API int64_t fkd_rows_terms(const FkdRows* student, const FkdRows* teacher, const int64_t* targets,
                               const FkdLoss* loss, const float* stats, float* sums, int64_t threads);
FKD_API int64_t fkd_rows_backward(const FkdRows* student, const FkdRows* teacher, const int64_t* targets,
                                  const FkdLoss* loss, const float* stats, const float* grad_soft,
                                  const float* grad_hard, const FkdRows* gradient, int64_t threads);
FKD_API int64_t fkd_rows_fused(const FkdRows* student, const FkdRows* teacher, const int64_t* targets,
                               const FkdLoss* loss, const float* coef_soft, const float* coef_hard, float* soft,
                               float* hard, const FkdRows* gradient, int64_t threads);

// The CUDA library: the same verbs with pointers into the memory of `device`, queued on `stream`; nothing waits. A row
// whose target is out of range becomes NaN and is not read. The gradient has the student's dtype or, of float32 logits,
// any other, rounded once. Each returns 0 or the code of a CUDA error. Targets, vectors and stats are contiguous;
// `scratch` is memory of the device, of as many bytes as fkd_cuda_scratch asks for.
enum FkdVerb { FKD_FORWARD = 1, FKD_BACKWARD = 2, FKD_FUSED = 3 };

FKD_API int64_t fkd_cuda_scratch(const FkdRows* student, const FkdRows* teacher, const FkdLoss* loss, int64_t verb,
                                 int64_t device);
FKD_API int64_t fkd_cuda_rows_forward(const FkdRows* student, const FkdRows* teacher, const int64_t* targets,
                                      const FkdLoss* loss, float* soft, float* hard, float* stats, void* scratch,
                                      int64_t device, void* stream);
FKD_API int64_t fkd_cuda_rows_backward(const FkdRows* student, const FkdRows* teacher, const int64_t* targets,
                                       const FkdLoss* loss, const float* stats, const float* grad_soft,
                                       const float* grad_hard, const FkdRows* gradient, int64_t device, void* stream);
FKD_API int64_t fkd_cuda_rows_fused(const FkdRows* student, const FkdRows* teacher, const int64_t* targets,
                                    const FkdLoss* loss, const float* coef_soft, const float* coef_hard, float* soft,
                                    float* hard, const FkdRows* gradient, void* scratch, int64_t device, void* stream);
FKD_API int64_t fkd_cuda_usable(int64_t device);  // 0, or the error that a kernel's code for this device meets
FKD_API const char* fkd_cuda_error_text(int64_t code);
FKD_API int64_t fkd_cuda_on_host(void);  // 1: built for the CPU by the tests
