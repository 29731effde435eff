// CUDA on the CPU, for tests: runs unchanged kernels with a fiber for each CUDA thread.
//
// Included before a .cu file in place of the CUDA toolkit's header. A block's fibers take turns on one thread: a fiber
// runs until it meets a barrier or passes a number to other lanes, and then the next one runs. Which warp and which
// lane comes next is shuffled by the seed FUSED_KD_HOST_SEED, so that a missing barrier shows as a wrong result for
// some seeds. Lanes that do not all come to the same shuffle, or threads that do not all come to the same barrier, end
// the process with a message. Built with -fsanitize=address,undefined, an access out of bounds or not aligned does so.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct dim3 {
    unsigned x, y, z;
    explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
template <class T>
void __stcs(T* to, const T& x) {
    *to = x;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
struct cudaFuncAttributes {};
using cudaStream_t = void*;

namespace cuda_host {

constexpr int kWarp = 32;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "cuda_host: %s\n", what);
    std::fflush(stderr);
    std::abort();
}

// What a fiber waits for. Lanes of a warp must wait for the same.
enum class Wait { nothing, lanes, block, finished };

struct Fiber {
    Wait wait;
    int operation, argument;  // of Wait::lanes
    bool odd;                 // which of a warp's two buffers its next operation uses
    void* stack_pointer;
    std::unique_ptr<char[]> stack;
#if !defined(__x86_64__)
    ucontext_t context;
#endif
    void* fake_stack;
};

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 512 << 10;
#else
constexpr size_t kStack = 128 << 10;
#endif

struct Machine {
    std::mutex busy;
    std::vector<Fiber> fibers;
    Fiber scheduler{};
    void (*entry)(void*) = nullptr;
    void* work = nullptr;
    int running = 0;
    std::vector<std::array<uint64_t, 2 * kWarp>> exchange;  // of each warp, two buffers in turn
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
};
inline Machine machine;

}  // namespace cuda_host

inline struct {
    unsigned x, y, z;
} threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

#if defined(__x86_64__)
// Keeps what a function must preserve on the old stack, and continues on the other one.
extern "C" void cuda_host_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.type cuda_host_switch, @function
cuda_host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cuda_host_switch, .-cuda_host_switch
)");
#endif

namespace cuda_host {

inline void jump(Fiber& from, Fiber& to, [[maybe_unused]] bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
    const bool back = &to == &machine.scheduler;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack,
                                   back ? machine.scheduler_stack : to.stack.get(),
                                   back ? machine.scheduler_stack_size : kStack);
#endif
#if defined(__x86_64__)
    cuda_host_switch(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(from.fake_stack, &bottom, &size);
#endif
}

inline void start() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_size);
#endif
    machine.entry(machine.work);
    Fiber& self = machine.fibers[static_cast<size_t>(machine.running)];
    self.wait = Wait::finished;
    jump(self, machine.scheduler, true);
}

inline void prepare(Fiber& fiber) {
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    fiber.wait = Wait::nothing;
    fiber.odd = false;
    fiber.fake_stack = nullptr;
#if defined(__x86_64__)
    const uintptr_t top = (reinterpret_cast<uintptr_t>(fiber.stack.get()) + kStack) / 16 * 16;
    void** at = reinterpret_cast<void**>(top - 16);
    *at = reinterpret_cast<void*>(&start);  // where the first switch to it returns to
    at[1] = nullptr;
    for (int i = 0; i < 6; ++i) *--at = nullptr;
    fiber.stack_pointer = at;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, &start, 0);
#endif
}

inline void wait_for(Wait what, int operation = 0, int argument = 0) {
    Fiber& self = machine.fibers[static_cast<size_t>(machine.running)];
    self.wait = what;
    self.operation = operation;
    self.argument = argument;
    jump(self, machine.scheduler, false);
}

// Runs the lanes of a warp until each waits, in this order. True if the warp did anything.
inline bool run_warp(int warp, const std::vector<int>& order) {
    Fiber* lanes = &machine.fibers[static_cast<size_t>(warp * kWarp)];
    bool ran = false;
    for (int lane : order) {
        if (lanes[lane].wait != Wait::nothing) continue;
        ran = true;
        machine.running = warp * kWarp + lane;
        threadIdx.x = static_cast<unsigned>(machine.running);
        jump(machine.scheduler, lanes[lane], false);
    }
    bool some = false, all = true;
    for (int lane = 0; lane < kWarp; ++lane) {
        const bool waits = lanes[lane].wait == Wait::lanes && lanes[lane].operation == lanes[0].operation &&
                           lanes[lane].argument == lanes[0].argument;
        some |= lanes[lane].wait == Wait::lanes;
        all &= waits;
    }
    if (some && !all) fail("divergent shuffle: not all lanes of a warp came to the same one");
    if (some)
        for (int lane = 0; lane < kWarp; ++lane) lanes[lane].wait = Wait::nothing;
    return ran;
}

inline void run_block(int threads, std::mt19937& random) {
    const int warps = threads / kWarp;
    for (int i = 0; i < threads; ++i) prepare(machine.fibers[static_cast<size_t>(i)]);
    std::vector<int> warp_order, lane_order;
    for (int i = 0; i < warps; ++i) warp_order.push_back(i);
    for (int i = 0; i < kWarp; ++i) lane_order.push_back(i);
    for (;;) {
        std::shuffle(warp_order.begin(), warp_order.end(), random);
        bool ran = false;
        for (int warp : warp_order) {
            std::shuffle(lane_order.begin(), lane_order.end(), random);
            // A warp may get far ahead of the others, up to its next barrier.
            for (unsigned turns = random() % 8 + 1; turns > 0 && run_warp(warp, lane_order); --turns) ran = true;
        }
        if (ran) continue;
        int finished = 0;
        for (int i = 0; i < threads; ++i) finished += machine.fibers[static_cast<size_t>(i)].wait == Wait::finished;
        if (finished == threads) return;
        if (finished > 0) fail("divergent barrier: some threads of a block came to it, others finished");
        for (int i = 0; i < threads; ++i) machine.fibers[static_cast<size_t>(i)].wait = Wait::nothing;
    }
}

inline unsigned seed() {
    const char* text = std::getenv("FUSED_KD_HOST_SEED");
    return text ? static_cast<unsigned>(std::strtoul(text, nullptr, 10)) : 0;
}

// Every lane of a warp gives a number and gets that of another.
template <class T>
T exchanged(unsigned mask, const T& x, int operation, int argument, int from) {
    if (mask != 0xffffffffu) fail("only whole warps may shuffle");
    static_assert(sizeof(T) <= 8, "");
    Fiber& self = machine.fibers[static_cast<size_t>(machine.running)];
    uint64_t* slots = machine.exchange[static_cast<size_t>(machine.running / kWarp)].data() + (self.odd ? kWarp : 0);
    self.odd = !self.odd;
    std::memcpy(&slots[machine.running % kWarp], &x, sizeof(T));
    wait_for(Wait::lanes, operation, argument);
    T y;
    std::memcpy(&y, &slots[from], sizeof(T));
    return y;
}

}  // namespace cuda_host

inline void __syncthreads() { cuda_host::wait_for(cuda_host::Wait::block); }
inline void __syncwarp() { cuda_host::wait_for(cuda_host::Wait::lanes, 2, 0); }

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int distance) {
    return cuda_host::exchanged(mask, x, 1, distance, static_cast<int>(threadIdx.x % 32) ^ distance);
}
inline int __any_sync(unsigned mask, int x) {
    for (int distance = 16; distance > 0; distance /= 2) x |= __shfl_xor_sync(mask, x, distance);
    return x != 0;
}

template <class Argument>
cudaError_t cudaLaunchKernel(void (*kernel)(Argument), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
    using namespace cuda_host;
    if (grid.x == 0 || block.x == 0 || block.x > 1024 || block.x % kWarp) return cudaErrorInvalidConfiguration;
    const std::lock_guard<std::mutex> lock(machine.busy);
    static std::mt19937 random(seed());
    using Plain = std::remove_const_t<Argument>;
    std::pair<void (*)(Argument), Plain*> call{kernel, static_cast<Plain*>(arguments[0])};
    machine.work = &call;
    machine.entry = [](void* work) {
        auto* c = static_cast<std::pair<void (*)(Argument), Plain*>*>(work);
        c->first(*c->second);
    };
    if (machine.fibers.size() < block.x) machine.fibers.resize(block.x);
    machine.exchange.resize(machine.fibers.size() / kWarp);
    blockDim = block;
    gridDim = grid;
    for (unsigned i = 0; i < grid.x; ++i) {
        blockIdx.x = i;
        run_block(static_cast<int>(block.x), random);
    }
    return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
// One multiprocessor, so that small batches meet both ways of giving rows to blocks.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess                     ? "no error"
           : error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
                                                    : "invalid argument";
}
