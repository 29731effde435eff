// Where a row of logits lies in memory, and its way into float32 and back.
#pragma once
#include <cstddef>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../storage.h"
#include "blocks.h"

namespace fused_kd {

class LogitsRow {
  public:
    LogitsRow(const FkdRows& a, int64_t row) : dtype_(a.dtype), size_(element_size(a)) {
        data_ = static_cast<char*>(a.data) + row_offset(a, row) * size_;
    }

    // Columns begin .. begin + n: in place where they are float32 already, else widened into `buffer`.
    const float* read(int64_t begin, int n, float* buffer) const {
        if (dtype_ == FKD_FLOAT32) return float32(begin);
        widen(address(begin), dtype_, n, buffer);
        return buffer;
    }
    float read(int64_t column) const {
        float buffer;
        return *read(column, 1, &buffer);
    }

    Input input(int64_t begin) const { return {address(begin), dtype_}; }
    Output output(int64_t begin) const { return {address(begin), dtype_}; }
    char* address(int64_t begin) const { return data_ + begin * size_; }

    void write_zeros(int64_t begin, int64_t end) const {
        if (begin < end) std::memset(data_ + begin * size_, 0, static_cast<size_t>((end - begin) * size_));
    }

  private:
    float* float32(int64_t begin) const { return reinterpret_cast<float*>(data_) + begin; }

    int64_t dtype_, size_;
    char* data_;
};

constexpr int64_t kHugePage = int64_t(2) << 20;

// A fresh gradient costs a page fault for every 4 KiB, as much time as computing it. Huge pages cost 512 times fewer.
inline void prefer_huge_pages(const FkdRows& a) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    int64_t elements = a.columns;
    for (int64_t d = a.dims - 1; d >= 0; elements *= a.sizes[d--])
        if (a.strides[d] != elements) return;
    constexpr uintptr_t huge = kHugePage;
    const uintptr_t data = reinterpret_cast<uintptr_t>(a.data);
    const uintptr_t begin = (data + huge - 1) / huge * huge;
    const uintptr_t end = (data + static_cast<uintptr_t>(elements * element_size(a))) / huge * huge;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)a;
#endif
}

}  // namespace fused_kd
