// The three verbs on NVIDIA GPUs. A row is a sequence of sections at fixed columns; a warp takes one at a time and its
// lanes keep to themselves until its end. The pieces meet in shared memory where a block has the whole row, else, for
// few rows, in device memory: the same sums in the same order, so that a row's bits do not depend on the batch.
#include <algorithm>

#include "finish.h"
#include "rest.h"

namespace fused_kd {
namespace {

constexpr int kMaxWarps = 16;
constexpr int kForwardWarps = 8;
constexpr int kFusedWarps = 16;  // few rows at a time: they stay in the L2 cache for their second visit
constexpr int kSplitWarps = 4;
// A row of more sections than this is always shared by blocks.
constexpr int kMaxPieces = 256;

// One block: a slice of a row's sections; forward, finish if they are all of the row, backward in reverse.
template <class V>
__global__ void __launch_bounds__(kMaxWarps* kWarp) rows_kernel(const Work w) {
    __shared__ Piece shared_pieces[kMaxPieces];
    __shared__ float shared_stats[FKD_STATS];
    const int64_t row = blockIdx.x / static_cast<unsigned>(w.slices);
    const int slice = static_cast<int>(blockIdx.x % static_cast<unsigned>(w.slices));
    const int64_t target = w.targets[row];
    const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
    const int stride = warps * w.slices;
    const int first = slice * warps + warp;
    const bool read = readable(target, w.columns);
    const RowView<V> view(w, row);
    float* stats = w.whole && w.backward ? shared_stats : w.stats + row * FKD_STATS;

    if (w.forward) {
        Piece* pieces = w.whole ? shared_pieces : w.pieces + row * w.sections;
        for (int section = first; read && section < w.sections; section += stride) {
            const Range at(w, section, target);
            const Piece piece = packed(section_sums<V>(w, view.from(at.begin), at));
            if (lane_index() == 0) pieces[section] = piece;
        }
        if (w.whole) {
            __syncthreads();
            if (warp == 0) finish_row(w, row, target, pieces, stats);
        }
    }
    if (w.backward) {
        if (w.forward) __syncthreads();
        row_gradient<V, RowGradient<V>>(w, row, target, stats, first, stride);
    }
}

// One warp a row whose pieces lie in device memory.
__global__ void finish_kernel(const Work w) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
    if (row < w.rows) finish_row(w, row, w.targets[row], w.pieces + row * w.sections, w.stats + row * FKD_STATS);
}

// The second sweep, and the gradients that are not q - p. Their variants are few: the teacher's dtype and the hard term
// are looked at as they run.
// Of a warp, where blocks share rows.
FKD_GPU int first_section(const Work& w) {
    const int slice = static_cast<int>(blockIdx.x % static_cast<unsigned>(w.slices));
    return (slice * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) / kWarp;
}

template <class V, class Terms>
__global__ void __launch_bounds__(kMaxWarps* kWarp) terms_kernel(const Work w) {
    const int64_t row = blockIdx.x / static_cast<unsigned>(w.slices), target = w.targets[row];
    const int section = first_section(w);
    if (!readable(target, w.columns) || section >= w.sections) return;
    const Range at(w, section, target);
    const Terms terms(w, w.stats + row * FKD_STATS);
    const typename Terms::Sums sums = section_terms(terms, RowView<V>(w, row).from(at.begin), at);
    if (lane_index() == 0) static_cast<typename Terms::Sums*>(w.terms)[row * w.sections + section] = sums;
}

// Of kSplitWarps warps.
template <class V>
__global__ void __launch_bounds__(kSplitWarps* kWarp) rest_kernel(const Work w) {
    __shared__ uint64_t listed[kSplitWarps][kFlags];
    const int64_t row = blockIdx.x / static_cast<unsigned>(w.slices), target = w.targets[row];
    const int section = first_section(w);
    if (!readable(target, w.columns) || section >= w.sections) return;
    const Range at(w, section, target);
    uint64_t* flags = listed[threadIdx.x / kWarp];
    flag_listed(w.teacher, row, at, flags);
    const RestSum sum = section_rest(w, RowView<V>(w, row).from(at.begin), at, flags);
    if (lane_index() == 0) static_cast<RestSum*>(w.terms)[row * w.sections + section] = sum;
}

__global__ void conclude_kernel(const Work w) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
    if (row >= w.rows || !readable(w.targets[row], w.columns)) return;
    float* stats = w.stats + row * FKD_STATS;
    if (w.divergence != FKD_REST)
        conclude_row(w, row, stats);
    else if (lane_index() == 0)
        conclude_rest(w, row, stats);
}

template <class V, class Gradient>
__global__ void __launch_bounds__(kMaxWarps* kWarp) other_gradient_kernel(const Work w) {
    const int64_t row = blockIdx.x / static_cast<unsigned>(w.slices);
    const int stride = static_cast<int>(blockDim.x) / kWarp * w.slices;
    row_gradient<V, Gradient>(w, row, w.targets[row], w.stats + row * FKD_STATS, first_section(w), stride);
}

// The device, for as long as this lives.
class OnDevice {
  public:
    explicit OnDevice(int64_t device) {
        error = cudaGetDevice(&before_);
        if (error == cudaSuccess && before_ != static_cast<int>(device)) {
            error = cudaSetDevice(static_cast<int>(device));
            moved_ = error == cudaSuccess;
        }
    }
    ~OnDevice() {
        if (moved_) cudaSetDevice(before_);
    }
    cudaError_t error;

  private:
    int before_ = 0;
    bool moved_ = false;
};

template <class Kernel>
cudaError_t launch(Kernel* kernel, int64_t blocks, int warps, const Work& w, void* stream) {
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    Work copy = w;
    void* arguments[] = {&copy};
    return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(warps * kWarp)),
                            arguments, size_t(0), static_cast<cudaStream_t>(stream));
}

using RowsKernel = void(const Work);

template <class S, class G>
RowsKernel* kernel_of(const Work& w) {
    // The gradient knows no entropy, and always adds what smoothing asks for.
    const bool options = w.tempered || (w.forward && (w.entropy || w.smoothing > 0));
    if (!w.use_soft) return rows_kernel<Variant<S, S, false, Hard::same, false, G>>;
    if (options || w.teacher.dtype != w.student.dtype)
        return rows_kernel<Variant<S, AnyDtype, true, Hard::exponential, true, G>>;
    if (!w.use_hard) return rows_kernel<Variant<S, S, true, Hard::off, false, G>>;
    if (w.temperature == 1) return rows_kernel<Variant<S, S, true, Hard::same, false, G>>;
    if (w.temperature == 2) return rows_kernel<Variant<S, S, true, Hard::square, false, G>>;
    return rows_kernel<Variant<S, S, true, Hard::exponential, false, G>>;
}

// The dtypes of student and gradient: one, or float32 and 16 bits, for logits that matrix products have made and that
// read the gradient again.
template <class Call>
RowsKernel* for_dtypes(const Work& w, Call call) {
    if (w.student.dtype == FKD_BFLOAT16) return call(Bfloat16(), Bfloat16());
    if (w.student.dtype == FKD_FLOAT16) return call(Float16(), Float16());
    if (w.backward && w.gradient.dtype == FKD_BFLOAT16) return call(Float32(), Bfloat16());
    if (w.backward && w.gradient.dtype == FKD_FLOAT16) return call(Float32(), Float16());
    return call(Float32(), Float32());
}

RowsKernel* kernel_for(const Work& w) {
    return for_dtypes(w, [&](auto student, auto gradient) {
        return kernel_of<decltype(student), decltype(gradient)>(w);
    });
}

template <class S, class G, class Kind>
RowsKernel* other_kernel(bool backward) {
    using Summed = std::conditional_t<std::is_same_v<Kind, ReverseKL>, Linear, Kind>;  // the value, and G
    if (!backward) return terms_kernel<Variant<S, AnyDtype, true, Hard::exponential, true>, TermsOf<Summed>>;
    using V = Variant<S, AnyDtype, true, Hard::exponential, true, G>;
    return other_gradient_kernel<V, OtherGradient<V, Kind>>;
}

// Its kernels read the student alone.
template <class S, class G>
RowsKernel* rest_kernel_of(bool backward) {
    if (!backward) return rest_kernel<Variant<S, S, false, Hard::exponential, false>>;
    using V = Variant<S, S, false, Hard::exponential, false, G>;
    return other_gradient_kernel<V, OtherGradient<V, Rest>>;
}

template <class S, class G>
RowsKernel* other_kernel(const Work& w, bool backward) {
    switch (w.divergence) {
        case FKD_REST: return rest_kernel_of<S, G>(backward);
        case FKD_REVERSE_KL: return other_kernel<S, G, ReverseKL>(backward);
        case FKD_LOGIT_MSE: return other_kernel<S, G, LogitMSE>(backward);
        case FKD_MIXTURE: return other_kernel<S, G, Mixture<false>>(backward);
        case FKD_SKEWED_MIXTURE: return other_kernel<S, G, Mixture<true>>(backward);
        case FKD_ALPHA_BETA: return other_kernel<S, G, AlphaBeta>(backward);
        case FKD_VARIATION: return other_kernel<S, G, Variation>(backward);
        default: return other_kernel<S, G, Linear>(backward);
    }
}

RowsKernel* other_kernel_for(const Work& w, bool backward) {
    return for_dtypes(w, [&](auto student, auto gradient) {
        return other_kernel<decltype(student), decltype(gradient)>(w, backward);
    });
}

int sections_of(int64_t columns) { return static_cast<int>((columns + kSection - 1) / kSection); }

// Few rows are shared by blocks: where whole rows would leave most of the GPU without work.
bool splits(int64_t rows, int sections, int64_t device) {
    if (sections == 1) return false;
    if (sections > kMaxPieces) return true;
    int multiprocessors = 0;
    if (cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, static_cast<int>(device)) != cudaSuccess)
        return true;
    return rows < 4 * multiprocessors;
}

// Without the soft term there is one temperature: that of the hard term, 1.
void set_soft(Work& w, bool soft, double temperature, double teacher_temperature) {
    if (!soft) temperature = teacher_temperature = 1;
    w.use_soft = soft;
    w.temperature = static_cast<float>(temperature);
    w.k_s = static_cast<float>(kLog2E / temperature);
    w.k_t = static_cast<float>(kLog2E / teacher_temperature);
    w.unit = static_cast<float>(1 / temperature);
    w.tempered = temperature != teacher_temperature;
    w.teacher_factor = static_cast<float>(temperature / teacher_temperature);
}

Work work_for(const FkdRows& student, const FkdRows& teacher, const int64_t* targets, const FkdLoss& loss) {
    Work w = {};
    w.student = student;
    w.teacher = teacher;
    w.targets = targets;
    w.rows = row_count(student);
    w.columns = loss.divergence == FKD_REST ? student.columns : std::min(student.columns, teacher.columns);
    w.sections = sections_of(w.columns);
    w.use_hard = loss.hard != 0;
    w.entropy = loss.soft && loss.divergence == FKD_CROSS_ENTROPY;
    w.smoothing = loss.hard ? static_cast<float>(loss.label_smoothing) : 0.0f;
    w.divergence = loss.divergence;
    w.numbers = FamilyNumbers(loss.numbers);
    w.rest = RestScale::of(loss.temperature);
    set_soft(w, loss.soft != 0, loss.temperature, loss.teacher_temperature);
    return w;
}
// Of kSplitWarps warps, a row each.
int64_t blocks_of_rows(const Work& w) { return (w.rows + kSplitWarps - 1) / kSplitWarps; }

cudaError_t run(Work w, int warps, bool split, void* stream) {
    if (w.rows == 0) return cudaSuccess;
    RowsKernel* kernel = kernel_for(w);
    const bool forward = w.forward, backward = w.backward;
    w.whole = !split;
    if (!split) {
        w.slices = 1;
        return launch(kernel, w.rows, std::max(1, std::min(warps, w.sections)), w, stream);
    }
    const int each = std::min(kSplitWarps, w.sections);
    w.slices = (w.sections + each - 1) / each;
    cudaError_t error = cudaSuccess;
    if (forward) {
        w.backward = false;
        error = launch(kernel, w.rows * w.slices, each, w, stream);
        if (error == cudaSuccess) error = launch(finish_kernel, blocks_of_rows(w), kSplitWarps, w, stream);
    }
    if (backward && error == cudaSuccess) {
        w.forward = false;
        w.backward = true;
        error = launch(kernel, w.rows * w.slices, each, w, stream);
    }
    return error;
}

// The soft term is neither forward KL nor cross entropy.
bool other(const FkdLoss& loss) { return loss.soft && loss.divergence >= FKD_REVERSE_KL; }

cudaError_t run_other(const Work& w, int warps, bool split, void* stream) {
    if (w.rows == 0) return cudaSuccess;
    const int each = std::min(kSplitWarps, w.sections);
    Work second = w;
    second.slices = (w.sections + each - 1) / each;
    cudaError_t error = cudaSuccess;
    if (w.forward) {
        Work first = w;
        first.backward = false;
        // Of these the first visit has the hard term, or nothing to read.
        if (w.divergence == FKD_LOGIT_MSE || w.divergence == FKD_REST) set_soft(first, false, 1, 1);
        if (!first.use_soft && !first.use_hard) first.sections = 0;
        error = run(first, warps, split && first.sections > 0, stream);
        if (error == cudaSuccess)
            error = launch(other_kernel_for(w, false), w.rows * second.slices, each, second, stream);
        if (error == cudaSuccess) error = launch(conclude_kernel, blocks_of_rows(w), kSplitWarps, w, stream);
    }
    if (w.backward && error == cudaSuccess)
        error = launch(other_kernel_for(w, true), w.rows * second.slices, each, second, stream);
    return error;
}

// Where a verb's scratch memory has what: `at` null asks for its size alone.
struct Scratch {
    char* at;
    int64_t size = 0;

    explicit Scratch(void* memory) : at(static_cast<char*>(memory)) {}
    template <class T>
    T* take(bool needed, int64_t count) {
        if (!needed) return nullptr;
        T* taken = reinterpret_cast<T*>(at + size);
        size += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
        return taken;
    }
};

int64_t set_scratch(Work& w, const FkdLoss& loss, bool split, void* memory) {
    Scratch scratch(memory);
    const int64_t pieces = w.rows * w.sections;
    w.pieces = scratch.take<Piece>(split, pieces);
    float* stats = scratch.take<float>(w.backward && (split || other(loss)), w.rows * FKD_STATS);
    if (stats) w.stats = stats;
    const size_t each = loss.divergence == FKD_LOGIT_MSE ? sizeof(Moments<float>)
                        : loss.divergence == FKD_REST    ? sizeof(RestSum)
                                                         : sizeof(TermSums<float>);
    w.terms = scratch.take<char>(other(loss), pieces * static_cast<int64_t>(each));
    return scratch.size;
}

cudaError_t run_verb(const Work& w, const FkdLoss& loss, int warps, bool split, void* stream) {
    return other(loss) ? run_other(w, warps, split, stream) : run(w, warps, split, stream);
}

}  // namespace
}  // namespace fused_kd

using namespace fused_kd;

int64_t fkd_abi_version(void) { return FKD_ABI_VERSION; }

int64_t fkd_cuda_scratch(const FkdRows* student, const FkdRows* teacher, const FkdLoss* loss, int64_t verb,
                         int64_t device) {
    if (!(verb & FKD_FORWARD)) return 0;
    Work w = work_for(*student, *teacher, nullptr, *loss);
    w.backward = verb == FKD_FUSED;
    return set_scratch(w, *loss, splits(w.rows, w.sections, device), nullptr);
}

int64_t fkd_cuda_rows_forward(const FkdRows* student, const FkdRows* teacher, const int64_t* targets,
                              const FkdLoss* loss, float* soft, float* hard, float* stats, void* scratch,
                              int64_t device, void* stream) {
    const OnDevice on(device);
    if (on.error != cudaSuccess) return on.error;
    Work w = work_for(*student, *teacher, targets, *loss);
    w.forward = true;
    w.soft = soft;
    w.hard = hard;
    w.stats = stats;
    const bool split = splits(w.rows, w.sections, device);
    set_scratch(w, *loss, split, scratch);
    return run_verb(w, *loss, kForwardWarps, split, stream);
}

int64_t fkd_cuda_rows_backward(const FkdRows* student, const FkdRows* teacher, const int64_t* targets,
                               const FkdLoss* loss, const float* stats, const float* grad_soft,
                               const float* grad_hard, const FkdRows* gradient, int64_t device, void* stream) {
    const OnDevice on(device);
    if (on.error != cudaSuccess) return on.error;
    Work w = work_for(*student, *teacher, targets, *loss);
    w.backward = true;
    w.stats = const_cast<float*>(stats);
    w.grad_soft = grad_soft;
    w.grad_hard = grad_hard;
    w.gradient = *gradient;
    return run_verb(w, *loss, kForwardWarps, true, stream);
}

int64_t fkd_cuda_rows_fused(const FkdRows* student, const FkdRows* teacher, const int64_t* targets,
                            const FkdLoss* loss, const float* coef_soft, const float* coef_hard, float* soft,
                            float* hard, const FkdRows* gradient, void* scratch, int64_t device, void* stream) {
    const OnDevice on(device);
    if (on.error != cudaSuccess) return on.error;
    Work w = work_for(*student, *teacher, targets, *loss);
    w.forward = w.backward = true;
    w.soft = soft;
    w.hard = hard;
    w.grad_soft = coef_soft;
    w.grad_hard = coef_hard;
    w.gradient = *gradient;
    const bool split = splits(w.rows, w.sections, device);
    set_scratch(w, *loss, split, scratch);
    return run_verb(w, *loss, kFusedWarps, split, stream);
}

int64_t fkd_cuda_usable(int64_t device) {
    const OnDevice on(device);
    if (on.error != cudaSuccess) return on.error;
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, finish_kernel);
    cudaGetLastError();  // it is answered here, and is not to be found by whoever asks next
    return error;
}

const char* fkd_cuda_error_text(int64_t code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int64_t fkd_cuda_on_host(void) {
#if defined(__CUDACC__)
    return 0;
#else
    return 1;
#endif
}
