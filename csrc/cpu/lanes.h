// How loops over a block are vectorised: by the compiler, once per instruction set (target_clones picks at load time),
// in a number of lanes that no machine changes.
#pragma once
#include <type_traits>

#include "../storage.h"
#include "blocks.h"

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(FKD_NO_CLONES)
#define FKD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FKD_CLONES
#endif
#if defined(__GNUC__)
#define FKD_INLINED __attribute__((always_inline))
#define FKD_PREFETCH(address) __builtin_prefetch(address)
#else
#define FKD_INLINED
#define FKD_PREFETCH(address) (void)(address)
#endif
#define FKD_SIMD _Pragma("omp simd")
#define FKD_SIMD_SUM(...) _Pragma(FKD_STRING(omp simd reduction(+ : __VA_ARGS__)))
#define FKD_STRING(x) #x

namespace fused_kd {

// A run-time choice as a type: call(constant or dtype).
template <class Call>
auto with_hard(Hard hard, const Call& call) {
    switch (hard) {
        case Hard::same: return call(std::integral_constant<Hard, Hard::same>());
        case Hard::square: return call(std::integral_constant<Hard, Hard::square>());
        case Hard::exponential: return call(std::integral_constant<Hard, Hard::exponential>());
        default: return call(std::integral_constant<Hard, Hard::off>());
    }
}
template <class Call>
auto with_dtype(int64_t dtype, const Call& call) {
    switch (dtype) {
        case FKD_BFLOAT16: return call(Bfloat16());
        case FKD_FLOAT16: return call(Float16());
        default: return call(Float32());
    }
}
template <class Dtype>
typename Dtype::Bits* elements(void* data, Dtype) {
    return static_cast<typename Dtype::Bits*>(data);
}
template <class Dtype>
const typename Dtype::Bits* elements(const void* data, Dtype) {
    return static_cast<const typename Dtype::Bits*>(data);
}

// A block's sums are kept in this many lanes, whatever the width of the machine's vectors: so their order, and with it
// a row's bits, depends on neither that nor the alignment of the data.
constexpr int kLanes = 16;

// All lanes as one: halves onto halves, in an order that no width of a vector changes.
template <int lanes, class T, class Join>
FKD_MATH T joined(const T* x, const Join& join) {
    if constexpr (lanes == 1) {
        return x[0];
    } else {
        T half[lanes / 2];
        FKD_SIMD
        for (int l = 0; l < lanes / 2; ++l) half[l] = join(x[l], x[l + lanes / 2]);
        return joined<lanes / 2>(half, join);
    }
}
FKD_MATH float total(const float* lanes) { return joined<kLanes>(lanes, [](float a, float b) { return a + b; }); }

// Asks memory for the next block's kLanes columns from j: a little at a time, so that it comes during the arithmetic.
template <int streams>
FKD_MATH void fetch(const Ahead& a, int j) {
    for (int i = 0; i < streams; ++i) FKD_PREFETCH(a.at[i] + j * a.size[i]);
}

// The last columns of a block that do not fill its lanes, with -inf in the others: those add nothing.
template <class Dtype, int lanes>
struct Tail {
    typename Dtype::Bits x[lanes];

    FKD_MATH Tail of(const typename Dtype::Bits* x, int n) {
        Tail tail;
        FKD_SIMD
        for (int l = 0; l < lanes; ++l) tail.x[l] = l < n ? x[l] : Dtype::kMinusInf;
        return tail;
    }
};

}  // namespace fused_kd
