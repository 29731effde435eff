// What the kernels have to do with a GPU: logits in 16-byte pieces, exponentials, and numbers passed between lanes.
#pragma once
#include "../storage.h"

// As FKD_MATH and FKD_MEMBER, for what only kernels call.
#define FKD_GPU_MEMBER __device__ __forceinline__
#define FKD_GPU static FKD_GPU_MEMBER

namespace fused_kd {

constexpr float kLn2f = static_cast<float>(kLn2);
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kGroup = 8;                     // adjacent columns that a lane takes at a time: 16 bytes or more
constexpr int kGroups = 2;                    // of them before it rescales its sums
constexpr int kChunk = kGroup * kGroups;      // columns
constexpr int kStep = kWarp * kChunk;         // columns that a warp takes at a time
constexpr int kSection = 8 * kStep;           // columns that a warp sums up by itself

FKD_GPU int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }

// 2^x with what the hardware makes of NaN and of an overflow, which exp2_of leaves open elsewhere.
FKD_GPU float power(float x) {
#if defined(__CUDA_ARCH__)
    return exp2_of(x);
#else
    return x < 128 ? exp2_of(x) : x * INFINITY;  // NaN stays NaN
#endif
}

// The larger; a NaN is passed over.
FKD_GPU float upper(float a, float b) {
#if defined(__CUDA_ARCH__)
    return fmaxf(a, b);
#else
    return b > a ? b : a;
#endif
}

FKD_GPU float widened_half(uint16_t x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#else
    return Float16::widened(x);
#endif
}

// The two numbers in 32 bits, and back.
FKD_GPU void widen_pair(Bfloat16, uint32_t bits, float* out) {
    out[0] = of_bits(bits << 16);
    out[1] = of_bits(bits & 0xffff0000u);
}
FKD_GPU void widen_pair(Float16, uint32_t bits, float* out) {
    out[0] = widened_half(static_cast<uint16_t>(bits));
    out[1] = widened_half(static_cast<uint16_t>(bits >> 16));
}
FKD_GPU uint32_t narrow_pair(Bfloat16, float low, float high) {
#if defined(__CUDA_ARCH__)
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
#else
    return Bfloat16::narrowed(low) | static_cast<uint32_t>(Bfloat16::narrowed(high)) << 16;
#endif
}
FKD_GPU uint32_t narrow_pair(Float16, float low, float high) {
#if defined(__CUDA_ARCH__)
    uint32_t bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
#else
    return Float16::narrowed(low) | static_cast<uint32_t>(Float16::narrowed(high)) << 16;
#endif
}

// kGroup adjacent columns that begin `past` bytes after `from`, a multiple of 16. Only `shifted` ones may begin other
// than there; for them 16 bytes more are read, up to kGroup columns after the last.
template <bool shifted, class Dtype>
FKD_GPU void load_group(Dtype dtype, const typename Dtype::Bits* from, int past, float* out) {
    constexpr int kSize = static_cast<int>(sizeof(*from)), kWords = kGroup * kSize / 4;
    constexpr int kLoaded = shifted ? kWords + 4 : kWords;
    uint32_t w[kLoaded];
#pragma unroll
    for (int i = 0; i < kLoaded; i += 4) {
        const uint4 x = *reinterpret_cast<const uint4*>(from + i * 4 / kSize);
        w[i] = x.x;
        w[i + 1] = x.y;
        w[i + 2] = x.z;
        w[i + 3] = x.w;
    }
    // A register is not found by a number: all words move down by eight bytes, by four, by two, or stay.
    if constexpr (shifted) {
#pragma unroll
        for (int i = 0; i < kWords + 2; ++i) w[i] = past & 8 ? w[i + 2] : w[i];
#pragma unroll
        for (int i = 0; i < kWords + 1; ++i) w[i] = past & 4 ? w[i + 1] : w[i];
#pragma unroll
        for (int i = 0; i < kWords && kSize == 2; ++i) w[i] = __funnelshift_r(w[i], w[i + 1], past & 2 ? 16 : 0);
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
        if constexpr (kSize == 2)
            widen_pair(dtype, w[i], out + 2 * i);
        else
            out[i] = of_bits(w[i]);
    }
}

// The same columns, to an address that is a multiple of 16, past the caches: nobody reads the gradient soon.
template <class Dtype>
FKD_GPU void store_group(Dtype dtype, const float* x, typename Dtype::Bits* to) {
    __stcs(reinterpret_cast<uint4*>(to), make_uint4(narrow_pair(dtype, x[0], x[1]), narrow_pair(dtype, x[2], x[3]),
                                                    narrow_pair(dtype, x[4], x[5]), narrow_pair(dtype, x[6], x[7])));
}
FKD_GPU void store_group(Float32, const float* x, float* to) {
    for (int i = 0; i < kGroup; i += 4)
        __stcs(reinterpret_cast<float4*>(to + i), make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]));
}

// How many bytes an address lies after a multiple of 16.
FKD_GPU int bytes_past(const void* address) { return static_cast<int>(reinterpret_cast<uintptr_t>(address) % 16); }

// Over the lanes of a warp, all of which get the same bits: a sum's order is that of a butterfly.
template <class Real>
FKD_GPU Real warp_max(Real x) {
#pragma unroll 1
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
        x = larger(x, __shfl_xor_sync(kAllLanes, x, distance));
    return x;
}

template <class Real>
FKD_GPU Partial<Real> warp_sum(Partial<Real> a) {
#pragma unroll 1
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        Partial<Real> b;
        b.z_s = __shfl_xor_sync(kAllLanes, a.z_s, distance);
        b.z_t = __shfl_xor_sync(kAllLanes, a.z_t, distance);
        b.b1 = __shfl_xor_sync(kAllLanes, a.b1, distance);
        b.b2 = __shfl_xor_sync(kAllLanes, a.b2, distance);
        b.excess = __shfl_xor_sync(kAllLanes, a.excess, distance);
        b.h = __shfl_xor_sync(kAllLanes, a.h, distance);
        b.rest = __shfl_xor_sync(kAllLanes, a.rest, distance);
        b.z_1 = __shfl_xor_sync(kAllLanes, a.z_1, distance);
        b.sum = __shfl_xor_sync(kAllLanes, a.sum, distance);
        a = added(a, b);
    }
    return a;
}

// The pieces of a warp's lanes as one.
template <class Real, class Scale>
FKD_GPU Partial<Real> warp_merged(const Partial<Real>& a, const Scale& k) {
    return warp_sum(moved(a, warp_max(a.max_s), warp_max(a.max_t), k));
}

}  // namespace fused_kd
