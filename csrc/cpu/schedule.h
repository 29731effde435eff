// Who works on what, and when: rows, or blocks of rows, over threads.
#pragma once
#include <algorithm>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

#include "logits.h"

namespace fused_kd {

// Below this many columns for each, more threads cost more than they bring.
constexpr int64_t kColumnsPerThread = 1 << 12;
// With fewer rows than this for each thread, threads share the blocks of a row.
constexpr int64_t kRowsPerThread = 4;

class Schedule {
  public:
    Schedule(int64_t rows, int64_t columns, int64_t threads)
        : rows_(rows), columns_(columns), blocks_((columns + kBlock - 1) / kBlock),
          threads_(std::max<int64_t>(1, std::min(threads, rows * columns / kColumnsPerThread))),
          split_(blocks_ > 1 && rows < threads_ * kRowsPerThread) {}

    int64_t blocks() const { return blocks_; }
    bool split() const { return split_; }

    // As many rows are worked on at a time as there are spaces. Where threads share rows, a row's space is the row's,
    // else it is the thread's.
    int64_t spaces() const { return std::min(rows_, threads_); }
    size_t space(int64_t row) const { return static_cast<size_t>(split_ ? row % threads_ : omp_get_thread_num()); }

    // measure(row, b, before) for all blocks of a row, then finish(row), sweep(row, b), conclude(row) and fill(row, b). A
    // thread fills a row (bound by memory) in step with measuring its next one (bound by arithmetic), so that they
    // overlap, and what is kept of a block gives its place to the next row's block while in cache. `before` is the row
    // being filled, or -1.
    template <class Measure, class Finish, class Sweep, class Conclude, class Fill>
    void run(const Measure& measure, const Finish& finish, const Sweep& sweep, const Conclude& conclude,
             const Fill& fill) const {
        if (!split_) {
            const int64_t chunk = rows_at_once();
#pragma omp parallel num_threads(threads_) if (threads_ > 1)
            {
                int64_t before = -1;
#pragma omp for schedule(dynamic, chunk) nowait
                for (int64_t row = 0; row < rows_; ++row) {
                    for (int64_t b = 0; b < blocks_; ++b) {
                        if (before >= 0) fill(before, b);
                        measure(row, b, before);
                    }
                    finish(row);
                    for (int64_t b = 0; b < blocks_; ++b) sweep(row, b);
                    conclude(row);
                    before = row;
                }
                for (int64_t b = 0; before >= 0 && b < blocks_; ++b) fill(before, b);
            }
            (void)chunk;
            return;
        }
#pragma omp parallel num_threads(threads_) if (threads_ > 1)
        for (int64_t begin = 0; begin < rows_; begin += threads_) {
            const int64_t end = std::min(begin + threads_, rows_);
#pragma omp for collapse(2)
            for (int64_t row = begin; row < end; ++row)
                for (int64_t b = 0; b < blocks_; ++b) measure(row, b, -1);
#pragma omp for
            for (int64_t row = begin; row < end; ++row) finish(row);
#pragma omp for collapse(2)
            for (int64_t row = begin; row < end; ++row)
                for (int64_t b = 0; b < blocks_; ++b) sweep(row, b);
#pragma omp for
            for (int64_t row = begin; row < end; ++row) conclude(row);
#pragma omp for collapse(2)
            for (int64_t row = begin; row < end; ++row)
                for (int64_t b = 0; b < blocks_; ++b) fill(row, b);
        }
    }

  private:
    // Rows handed to a thread at once: a huge page of the gradient, since two threads that touch a new page together
    // both clear it, but no less than four turns for each thread, unless rows are tiny. Threads get equally many turns.
    int64_t rows_at_once() const {
        const int64_t page = std::min(kHugePage / 4 / columns_, rows_ / (4 * threads_));
        const int64_t rows = std::max<int64_t>({1, kColumnsPerThread / columns_, page});
        const int64_t turns = std::max<int64_t>(1, rows_ / (rows * threads_)) * threads_;
        return (rows_ + turns - 1) / turns;
    }

    int64_t rows_, columns_, blocks_, threads_;
    bool split_;
};

}  // namespace fused_kd
