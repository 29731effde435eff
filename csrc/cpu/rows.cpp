// The three verbs on the CPU. A row is a sequence of blocks: each is measured by itself, the results are merged from
// left to right, for a family of divergences all blocks are visited again (csrc/families.h), and the finished row gives
// every block its part of the gradient. That sequence depends on the
// vocabulary alone, so a row's bits depend neither on the other rows nor on the number of threads.
#include <algorithm>
#include <iterator>
#include <new>
#include <vector>

#include "schedule.h"

namespace fused_kd {
namespace {

// What is at least this many bytes is in no cache when somebody reads it next.
constexpr int64_t kLargerThanCaches = int64_t(32) << 20;

// From this sum of v, or of c, on a row's student is far for FarMixture; from this KL(p || q) on it likely is.
constexpr float kFarTerms = 1.0f / 32, kFarLikely = 8 * kFarTerms;

// NaN where one is.
float upper_or_nan(double a, float b) { return a >= b ? static_cast<float>(a) : a < b ? b : NAN; }

struct Range {
    int64_t begin;
    int n;
};

// What one row needs while it is worked on.
struct Workspace {
    std::vector<Partial<double>> pieces;  // one a block
    std::vector<Moments<double>> moments;
    std::vector<TermSums<double>> terms;
    std::vector<float> kept;              // fused verb: kept_ floats a column
    float stats[FKD_STATS];
};

class Verb {
  public:
    Verb(const FkdRows& student, const FkdRows& teacher, const int64_t* targets, const FkdLoss& loss, int64_t threads)
        : student_(student), teacher_(teacher), targets_(targets), loss_(loss), scales_(loss.temperature),
          numbers_(loss.numbers),
          teacher_factor_(static_cast<float>(loss.temperature / loss.teacher_temperature)), rows_(row_count(student)),
          columns_(loss.divergence == FKD_REST ? student.columns : std::min(student.columns, teacher.columns)),
          schedule_(rows_, columns_, threads),
          of_logits_(loss.soft && loss.divergence == FKD_LOGIT_MSE),
          of_rest_(loss.soft && loss.divergence == FKD_REST),
          of_family_(loss.soft && loss.divergence >= FKD_LINEAR),
          other_(loss.soft && loss.divergence >= FKD_REVERSE_KL),
          hard_(!loss.hard                ? Hard::off
                : !loss.soft || of_logits_ ? Hard::exponential
                : loss.temperature == 1.0 ? Hard::same
                : loss.temperature == 2.0 ? Hard::square
                                          : Hard::exponential),
          kept_(!loss.soft ? 1 : other_ ? 0 : hard_ == Hard::exponential ? 3 : 2) {
        scales_.exchanged = loss.soft && loss.divergence == FKD_REVERSE_KL;
        if (columns_ == 1 && !of_logits_) scales_.unit = 0;  // both probabilities are 1, whatever the last bit says
    }

    int64_t first_bad_target() const {
        for (int64_t row = 0; row < rows_; ++row)
            if (targets_[row] != FKD_SKIP && !readable(targets_[row], columns_)) return row;
        return -1;
    }

    void forward(float* soft, float* hard, float* stats) const {
        std::vector<Workspace> spaces = workspaces(0);
        const auto of_row = [=](int64_t row) { return stats + row * FKD_STATS; };
        run(spaces, nullptr, soft, hard, of_row, [](int64_t, int64_t) {});
    }

    void terms(const float* stats, float* sums) const {
        std::vector<Workspace> spaces = workspaces(0);
        const auto none = [](auto...) {};
        const auto sum_up = [&](int64_t row) {
            const TermSums<double> x = targets_[row] == FKD_SKIP ? TermSums<double>{} : swept(space(spaces, row));
            const double values[FKD_TERMS] = {x.v, x.c, x.rest_c, x.rest_q};
            for (int i = 0; i < FKD_TERMS; ++i) sums[row * FKD_TERMS + i] = static_cast<float>(values[i]);
        };
        schedule_.run(
            none, none,
            [&](int64_t row, int64_t b) { sweep(row, b, space(spaces, row), stats + row * FKD_STATS, false); }, sum_up,
            none);
    }

    void backward(const float* stats, const float* grad_soft, const float* grad_hard, const FkdRows& gradient) const {
        prefer_huge_pages(gradient);
        const auto none = [](auto...) {};
        schedule_.run(none, none, none, none, [&](int64_t row, int64_t b) {
            const GradientScales r = gradient_scales(row, stats + row * FKD_STATS, grad_soft, grad_hard);
            write_gradient(row, b, gradient, r, [&](Range at, Output g) {
                if (other_) return other_gradient(row, at, r, g);
                float buffer[kBlock];
                const LogitsRow student(student_, row), teacher(teacher_, row);
                if (!loss_.soft) return block_hard_gradient(student.read(at.begin, at.n, buffer), at.n, r, g);
                const Input s = student.input(at.begin);
                Input t = teacher.input(at.begin);
                if (t.dtype != s.dtype || scaled()) {
                    const float* widened = teacher.read(at.begin, at.n, buffer);
                    t = {teacher_scaled(widened, at.n, r.teacher_from, buffer), FKD_FLOAT32};
                }
                block_gradient(hard_, s, t, at.n, r, scales_, g);
            });
        });
    }

    void fused(const float* coef_soft, const float* coef_hard, float* soft, float* hard,
               const FkdRows& gradient) const {
        prefer_huge_pages(gradient);
        std::vector<Workspace> spaces = workspaces(kept_);
        const auto of_row = [&](int64_t row) { return space(spaces, row).stats; };
        run(spaces, &gradient, soft, hard, of_row, [&](int64_t row, int64_t b) {
            Workspace& w = space(spaces, row);
            const GradientScales r = gradient_scales(row, w.stats, coef_soft, coef_hard);
            write_gradient(row, b, gradient, r, [&](Range at, Output g) {
                if (other_) return other_gradient(row, at, r, g);
                const KeptFactors f = kept_factors(w.pieces[static_cast<size_t>(b)], r);
                const Kept kept = kept_block(w, b);
                loss_.soft ? block_gradient_of_kept(hard_, kept, at.n, f, g)
                           : block_hard_gradient_of_kept(kept, at.n, f, g);
            });
        });
    }

  private:
    // The visits of the rows up to their values and stats; `gradient`: that of the fused verb.
    template <class Stats, class Fill>
    void run(std::vector<Workspace>& spaces, const FkdRows* gradient, float* soft, float* hard, const Stats& stats,
             const Fill& fill) const {
        schedule_.run(
            [&](int64_t row, int64_t b, int64_t before) { measure(row, b, space(spaces, row), before, gradient); },
            [&](int64_t row) { finish(row, space(spaces, row), soft, hard, stats(row)); },
            [&](int64_t row, int64_t b) {
                if (of_family_) sweep(row, b, space(spaces, row), stats(row), likely_far(soft[row]));
            },
            [&](int64_t row) { if (of_family_) conclude(row, space(spaces, row), soft, stats(row)); },
            fill);
    }
    Range range(int64_t b) const {
        return {b * kBlock, static_cast<int>(std::min<int64_t>(kBlock, columns_ - b * kBlock))};
    }
    // A teacher temperature of its own is a factor on the teacher's logits, once their maximum is taken off (scaled as
    // they are, large ones would lose digits).
    const float* teacher_scaled(const float* t, int n, float from, float* buffer) const {
        if (!scaled()) return t;
        block_scale(t, n, from, teacher_factor_, buffer);
        return buffer;
    }
    const float* read_teacher(int64_t row, Range at, float from, float* buffer) const {
        return teacher_scaled(LogitsRow(teacher_, row).read(at.begin, at.n, buffer), at.n, from, buffer);
    }
    bool scaled() const { return teacher_factor_ != 1.0f; }
    // What is touched after block b of `row`: the next block of logits, and in step with it the gradient of row
    // `before` and what is kept, where the verb has them. A stream that it lacks repeats the first.
    Ahead ahead(int64_t row, int64_t b, int64_t before = -1, const FkdRows* gradient = nullptr,
                const float* kept = nullptr) const {
        if (++b == schedule_.blocks()) {
            before = row;
            row = std::min(row + 1, rows_ - 1);
            b = 0;
        }
        Ahead a;
        int streams = 0;
        const auto add = [&](const void* at, int size) {
            a.at[streams] = static_cast<const char*>(at);
            a.size[streams++] = size;
        };
        const auto add_row = [&](const FkdRows& rows, int64_t of) {
            add(LogitsRow(rows, of).address(b * kBlock), static_cast<int>(element_size(rows)));
        };
        add_row(student_, row);
        add_row(loss_.divergence == FKD_REST ? student_ : teacher_, row);
        if (gradient && before >= 0 && !past_caches(*gradient)) add_row(*gradient, before);
        for (int i = 0; kept && i < kept_; ++i) add(kept + i * kept_stride() + b * kBlock, sizeof(float));
        while (streams < kStreams) add(a.at[0], a.size[0]);
        return a;
    }
    // A float32 gradient that no cache will hold is written past them, where all its rows lie at multiples of 16 bytes;
    // but not over the logits, whose lines are there; nor where one row of logits is all that is read: that is slower.
    bool past_caches(const FkdRows& gradient) const {
        bool apart = gradient.data != student_.data && reinterpret_cast<uintptr_t>(gradient.data) % 16 == 0;
        for (int64_t d = 0; d < gradient.dims; ++d) apart = apart && gradient.strides[d] % 4 == 0;
        return loss_.soft && !of_rest_ && gradient.dtype == FKD_FLOAT32 && apart &&
               rows_ * columns_ * 4 >= kLargerThanCaches;
    }
    bool likely_far(float kl) const {
        return kl >= kFarLikely && (loss_.divergence == FKD_MIXTURE || loss_.divergence == FKD_SKEWED_MIXTURE);
    }
    bool labelled(int64_t row) const { return hard_ != Hard::off && targets_[row] >= 0; }

    std::vector<Workspace> workspaces(int64_t kept) const {
        std::vector<Workspace> spaces(static_cast<size_t>(schedule_.spaces()));
        const size_t blocks = static_cast<size_t>(schedule_.blocks());
        for (Workspace& w : spaces) {
            w.pieces.resize(blocks);
            w.moments.resize(of_logits_ ? blocks : 0);
            w.terms.resize(of_family_ ? blocks : 0);
            w.kept.resize(static_cast<size_t>(kept * kept_stride()));
        }
        return spaces;
    }
    Workspace& space(std::vector<Workspace>& spaces, int64_t row) const { return spaces[schedule_.space(row)]; }
    // The three are read and written side by side: at a distance of whole pages they would evict one another.
    int64_t kept_stride() const { return schedule_.blocks() * kBlock + 272; }
    Kept kept_block(Workspace& w, int64_t b) const {
        const int64_t stride = kept_stride();
        float* first = w.kept.data() + b * kBlock;
        if (!loss_.soft) return {nullptr, nullptr, first};
        return {first, first + stride, hard_ == Hard::exponential ? first + 2 * stride : nullptr};
    }

    void measure(int64_t row, int64_t b, Workspace& w, int64_t before, const FkdRows* gradient) const {
        if (targets_[row] == FKD_SKIP) return;
        const bool keep = gradient != nullptr && !other_;  // the fused verb: fill() will write it from what is kept
        float buffers[2][kBlock];
        const Range at = range(b);
        Partial<double> piece;
        const float* s = LogitsRow(student_, row).read(at.begin, at.n, buffers[0]);
        float max_s = of_rest_ ? 0 : block_maximum(s, at.n);
        float student_from = max_s;
        const Kept kept = keep ? kept_block(w, b) : Kept{};
        if (of_logits_) {
            const float* t = read_teacher(row, at, 0, buffers[1]);
            w.moments[static_cast<size_t>(b)] = {};
            w.moments[static_cast<size_t>(b)] += block_moments(s, t, at.n, scales_, ahead(row, b));
            piece.max_t = 0;
        } else if (of_rest_) {
            piece.max_s = student_from = max_s = measure_rest(row, at, s, buffers[1], piece);
        } else if (loss_.soft) {
            const float* t = LogitsRow(teacher_, row).read(at.begin, at.n, buffers[1]);
            const float max_t = block_maximum(t, at.n);
            t = teacher_scaled(t, at.n, max_t, buffers[1]);
            const bool exchanged = scales_.exchanged;
            float top = scaled() ? 0 : max_t, other_top = max_s;
            const float *base = t, *other = s;  // the one that is 0 log 0, and the one it is compared with
            if (exchanged) {
                std::swap(base, other);
                std::swap(top, other_top);
            }
            const Sample sample = block_sample(other, base, at.n, top, scales_);
            Centre centre = centre_of(other_top, top, sample, scales_);
            const float variance = sample.variance * scales_.unit * scales_.unit;
            const Distance guess = variance > 4 * kFar    ? Distance::far
                                   : variance > 4 * kNear ? Distance::near
                                                          : Distance::close;
            const Ahead next = ahead(row, b, before, gradient, keep ? w.kept.data() : nullptr);
            const auto sums_from = [&](const Centre& m, Distance likely, bool sure) {
                return block_sums(hard_, exchanged, other, base, at.n, m, scales_, likely, sure, keep ? &kept : nullptr,
                                  next);
            };
            BlockSums sums = sums_from(centre, guess, !sample.spread());
            // A column with nearly all of p was taken for one of many. What the others have is all there is to see then.
            if ((sample.spread() || guess == Distance::far) && sums.z_t <= kSure) {
                centre = Centre::of(other_top, top);
                sums = sums_from(centre, Distance::close, true);
            }
            student_from = exchanged ? centre.teacher : centre.student;
            piece.max_s = centre.student;
            piece.max_t = centre.teacher;
            if (scaled()) (exchanged ? piece.max_s : piece.max_t) += static_cast<double>(max_t) * teacher_factor_;
            piece.z_s = sums.z_s;
            piece.z_t = sums.z_t;
            piece.b1 = sums.b1;
            piece.b2 = sums.b2;
            piece.excess = sums.excess;
            piece.z_1 = sums.z_1;
            if (!(max_t < INFINITY)) piece.z_t = NAN;
            if (loss_.divergence == FKD_CROSS_ENTROPY) {
                const EntropySums entropy = block_entropy_sums(t, at.n, centre.teacher, scales_);
                piece.h = entropy.h;
                piece.rest = entropy.rest;
            }
        }
        if (!loss_.soft || of_logits_) {
            piece.max_s = student_from;
            if (labelled(row)) piece.z_1 = block_hard_sum(s, at.n, student_from, kept.e_1);
        }
        if (labelled(row)) {
            const int64_t label = targets_[row] - at.begin;
            if (0 <= label && label < at.n)
                piece.z_1 = without_label(s, at.n, static_cast<int>(label), student_from, piece.z_1);
            if (loss_.label_smoothing > 0) piece.sum = block_sum(s, at.n);
        }
        if (!(max_s < INFINITY)) piece.z_s = piece.z_1 = NAN;
        w.pieces[static_cast<size_t>(b)] = piece;
    }

    // The sum over the columns whose ids the teacher does not list, z_t from max_t; and z_1 over all of them from their
    // maximum, which it returns. `others`: room for a block.
    float measure_rest(int64_t row, Range at, const float* s, float* others, Partial<double>& piece) const {
        int listed[kBlock];  // their columns in the block
        int count = 0;
        const auto* ids = reinterpret_cast<const int64_t*>(LogitsRow(teacher_, row).address(0));
        for (int64_t i = 0; i < teacher_.columns && count < kBlock; ++i) {
            const int64_t j = ids[i] - at.begin;
            if (j >= 0 && j < at.n) listed[count++] = static_cast<int>(j);
        }
        // Taken out of a copy: the loops would be slower from one listed column to the next.
        const float* rest = count == 0 ? s : static_cast<float*>(std::memcpy(others, s, sizeof(float) * at.n));
        for (int i = 0; i < count; ++i) others[listed[i]] = -INFINITY;
        const float max_rest = block_maximum(rest, at.n);
        const RestSums sums =
            block_rest_sums(hard_, rest, at.n, max_rest, RestScale::of(loss_.temperature), ahead(row, at.begin / kBlock));
        float max_s = max_rest;
        for (int i = 0; i < count; ++i) max_s = upper_or_nan(max_s, s[listed[i]]);
        double z_1 = sums.z_1 * hard_exponential<Hard::exponential>(0, max_rest, max_s);
        for (int i = 0; i < count; ++i) z_1 += hard_exponential<Hard::exponential>(0, s[listed[i]], max_s);
        piece.z_1 = hard_ != Hard::exponential ? z_1 : labelled(row) ? block_hard_sum(s, at.n, max_s, nullptr) : 0;
        piece.max_t = max_rest;
        piece.z_t = max_rest < INFINITY ? sums.z : NAN;
        return max_s;
    }

    // log R, and its stats (REST of fused_kd/backends/rows.py); and the sums of the hard term, in `total`.
    double finish_rest(const Workspace& w, Partial<double>& total, float* stats) const {
        total = {};
        for (const Partial<double>& x : w.pieces) {
            total.max_s = larger(total.max_s, x.max_s);
            total.max_t = larger(total.max_t, x.max_t);
        }
        for (const Partial<double>& x : w.pieces) {
            total.z_t += x.z_t == 0 ? 0 : x.z_t * std::exp((x.max_t - total.max_t) / loss_.temperature);
            total.z_1 += x.z_1 == 0 ? 0 : x.z_1 * std::exp(x.max_s - total.max_s);
            total.sum += x.sum;
        }
        stats[FKD_STUDENT_SUM] = static_cast<float>(total.z_t);
        stats[FKD_LOG_RATIO] = static_cast<float>(total.z_t - stats[FKD_STUDENT_SUM]);
        return total.max_t / loss_.temperature + std::log(total.z_t);
    }

    // A block's sum of exp(s - max) without its label's. Where the label has most of it, subtracting would lose the rest.
    double without_label(const float* s, int n, int label, float student_max, double sum) const {
        const float own = hard_exponential<Hard::exponential>(0, s[label], student_max);
        if (own < sum / 2) return sum - own;
        return static_cast<double>(block_hard_sum(s, label, student_max, nullptr)) +
               block_hard_sum(s + label + 1, n - label - 1, student_max, nullptr);
    }

    void finish(int64_t row, const Workspace& w, float* soft, float* hard, float* stats) const {
        soft[row] = hard[row] = 0;
        const int64_t target = targets_[row];
        Partial<double> total;
        Row<double> result;
        if (target != FKD_SKIP && !of_rest_) {
            total = w.pieces[0];
            for (size_t b = 1; b < w.pieces.size(); ++b) total = merge(total, w.pieces[b], scales_);
        }
        std::fill_n(stats, int{FKD_STATS}, 0.0f);
        if (target != FKD_SKIP && of_logits_) {
            Moments<double> moments;
            for (const Moments<double>& x : w.moments) moments += x;
            soft[row] = static_cast<float>(mean_squares(moments, numbers_.parameter[0] != 0, stats));
        } else if (target != FKD_SKIP && of_rest_) {
            soft[row] = static_cast<float>(finish_rest(w, total, stats));
        } else if (target != FKD_SKIP && loss_.soft) {
            finish_soft(total, result);
            const double entropy = loss_.divergence == FKD_CROSS_ENTROPY ? teacher_entropy(total) : 0;
            soft[row] = static_cast<float>(result.kl + entropy);
        }
        if (target != FKD_SKIP && scales_.exchanged) {
            stats[FKD_GROWTH] = static_cast<float>(result.kl);
            stats[FKD_TOP] = std::isfinite(result.kl) ? static_cast<float>(total.b1 / total.z_t) : NAN;
            std::swap(total.max_s, total.max_t);
            std::swap(total.z_s, total.z_t);
            result.log_ratio = -result.log_ratio;
        }
        if (labelled(row)) {
            const double label_logit = LogitsRow(student_, row).read(target);
            finish_hard(total, total.max_s, label_logit, result);
            const double value = smoothed(result.nll, label_logit, total.sum, columns_, loss_.label_smoothing);
            hard[row] = static_cast<float>(value);
        }
        const double max_t = total.max_t / teacher_factor_;
        const double values[] = {total.max_s,      max_t,           total.z_s,  total.z_t,
                                 result.log_ratio, result.hard_sum, result.miss};
        for (size_t i = 0; i < std::size(values); ++i)
            if (!of_rest_ || (i != FKD_STUDENT_SUM && i != FKD_LOG_RATIO)) stats[i] = static_cast<float>(values[i]);
    }

    // `far` of GradientScales, which those stats do not know yet.
    void sweep(int64_t row, int64_t b, Workspace& w, const float* stats, bool far) const {
        if (targets_[row] == FKD_SKIP) return;
        float buffers[2][kBlock];
        const Range at = range(b);
        GradientScales r = row_scales(stats);
        r.far = far;
        const float* s = LogitsRow(student_, row).read(at.begin, at.n, buffers[0]);
        const float* t = read_teacher(row, at, r.teacher_from, buffers[1]);
        w.terms[static_cast<size_t>(b)] = {};
        w.terms[static_cast<size_t>(b)] +=
            block_term_sums(loss_.divergence, s, t, at.n, r, scales_, numbers_, ahead(row, b));
    }

    static TermSums<double> swept(const Workspace& w) {
        TermSums<double> sums;
        for (const TermSums<double>& x : w.terms) sums += x;
        return sums;
    }

    void conclude(int64_t row, Workspace& w, float* soft, float* stats) const {
        if (targets_[row] == FKD_SKIP) return;
        TermSums<double> sums = swept(w);
        if (likely_far(soft[row]) && !(sums.v >= kFarTerms)) {  // columns with next to nothing of p made KL large
            for (int64_t b = 0; b < schedule_.blocks(); ++b) sweep(row, b, w, stats, false);
            sums = swept(w);
        }
        const bool whole = stats[FKD_LOG_RATIO] == stats[FKD_LOG_RATIO];
        soft[row] = whole ? static_cast<float>(sums.v) : NAN;
        stats[FKD_GROWTH] = static_cast<float>(sums.growth());
        stats[FKD_TOP] = static_cast<float>(sums.top());
    }

    RestGradient rest_gradient(const GradientScales& r) const {
        const float from = r.teacher_from, sum = r.row.sums.z_s;
        const bool power = hard_ == Hard::same || hard_ == Hard::square;
        const float by_1 = power ? r.hard * std::exp(from - r.centre.student) : r.hard;
        return {from, scales_.log2, sum == 0 ? 0 : r.soft / sum, by_1, r.centre.student, r.constant};
    }

    void other_gradient(int64_t row, Range at, const GradientScales& r, Output g) const {
        float buffers[3][kBlock];
        const float* s = LogitsRow(student_, row).read(at.begin, at.n, buffers[0]);
        const bool there = g.dtype == FKD_FLOAT32 && !g.past_caches;
        float* out = there ? static_cast<float*>(g.data) : buffers[2];
        if (of_rest_)
            block_rest_gradient(hard_, s, at.n, rest_gradient(r), out);
        else
            block_other_gradient(loss_.divergence, hard_, s, read_teacher(row, at, r.teacher_from, buffers[1]), at.n, r,
                                 scales_, numbers_, out, ahead(row, at.begin / kBlock));
        if (!there) narrow(out, at.n, g);
    }

    // Without what the loss weighs the terms with.
    GradientScales row_scales(const float* stats) const {
        GradientScales r = {};
        r.centre = Centre::of(stats[FKD_STUDENT_MAX], scaled() ? 0 : stats[FKD_TEACHER_MAX]);
        r.teacher_from = stats[FKD_TEACHER_MAX];
        r.row = Finished::of(stats, of_family_);
        r.far = r.row.growth >= kFarTerms;
        return r;
    }

    GradientScales gradient_scales(int64_t row, const float* stats, const float* soft, const float* hard) const {
        GradientScales r = row_scales(stats);
        r.soft = loss_.soft ? soft[row] * scales_.unit : 0.0f;
        if (labelled(row)) {
            const float smoothing = static_cast<float>(loss_.label_smoothing);
            r.hard = hard[row] / stats[FKD_HARD_SUM];
            r.constant = -hard[row] * smoothing / static_cast<float>(columns_);
            r.at_label = hard[row] * (smoothing - stats[FKD_MISS]) + r.constant;
        }
        return r;
    }

    // fill(columns, g) computes one block of the gradient but for the label's own element.
    template <class Fill>
    void write_gradient(int64_t row, int64_t b, const FkdRows& gradient, const GradientScales& r,
                        const Fill& fill) const {
        const LogitsRow out(gradient, row);
        const Range at = range(b);
        if (b == schedule_.blocks() - 1) out.write_zeros(columns_, gradient.columns);
        if (targets_[row] == FKD_SKIP) return out.write_zeros(at.begin, at.begin + at.n);
        const int64_t label = targets_[row] - at.begin;
        const bool here = labelled(row) && 0 <= label && label < at.n;
        const float at_label = here ? gradient_at_label(row, r) : 0;  // before the gradient overwrites the logits
        Output to = out.output(at.begin);
        to.past_caches = past_caches(gradient);
        fill(at, to);
        if (to.past_caches && (schedule_.split() || b == schedule_.blocks() - 1)) finish_stores();
        if (here) narrow(at_label, out.output(targets_[row]));
    }

    // softmax(s)[label] - 1 would lose what a sure student has left to learn; r.at_label has it from the other columns.
    float gradient_at_label(int64_t row, const GradientScales& r) const {
        if (!loss_.soft) return r.at_label;
        const float s = LogitsRow(student_, row).read(targets_[row]);
        if (of_rest_) {
            RestGradient soft = rest_gradient(r);
            soft.constant = 0;
            float g;
            block_rest_gradient(Hard::off, &s, 1, soft, &g);
            return r.at_label + g;
        }
        float t = LogitsRow(teacher_, row).read(targets_[row]);
        t = *teacher_scaled(&t, 1, r.teacher_from, &t);
        if (other_) {
            GradientScales soft = r;
            soft.constant = 0;
            float g;
            block_other_gradient(loss_.divergence, Hard::off, &s, &t, 1, soft, scales_, numbers_, &g, ahead(row, 0));
            return r.at_label + g;
        }
        const Pair pair = exponentials(s, t, r.centre, scales_);
        const float log_ratio = pair.delta - r.row.log_ratio;
        const RowSums& z = r.row.sums;
        return r.at_label + r.soft * probability_difference(pair.e_s * z.per_z_s, pair.e_t * z.per_z_t, log_ratio);
    }

    // q - p = f_s e_s - f_t e_t = f_s (e_s - e_t) + (f_s - f_t) e_t, each factor without cancellation.
    KeptFactors kept_factors(const Partial<double>& piece, const GradientScales& r) const {
        const float down_s = static_cast<float>(piece.max_s - r.centre.student);
        const float down_t = static_cast<float>(piece.max_t - static_cast<double>(r.teacher_from) * teacher_factor_);
        const float f_s = std::exp2(down_s * scales_.log2) * r.row.sums.per_z_s;
        const float f_t = std::exp2(down_t * scales_.log2) * r.row.sums.per_z_t;
        const float apart = (down_s - down_t) * scales_.unit - r.row.log_ratio;
        const float f_1 = std::exp2(down_s * static_cast<float>(kLog2E));
        return {r.soft * f_s, r.soft * (std::fabs(apart) < 1 ? f_t * std::expm1(apart) : f_s - f_t),
                r.hard * f_1, r.constant};
    }

    const FkdRows& student_;
    const FkdRows& teacher_;
    const int64_t* targets_;
    const FkdLoss& loss_;
    Scales scales_;
    FamilyNumbers numbers_;
    float teacher_factor_;
    int64_t rows_, columns_;
    Schedule schedule_;
    // The soft term is LogitMSE; that of a sparse teacher; a family's, which takes a second sweep; or anything but forward
    // KL and cross entropy.
    bool of_logits_, of_rest_, of_family_, other_;
    Hard hard_;
    int64_t kept_;  // floats a column that the fused verb keeps
};

template <class Call>
int64_t checked(const Verb& verb, const Call& call) {
    const int64_t bad = verb.first_bad_target();
    if (bad >= 0) return bad;
    try {
        call();
    } catch (const std::bad_alloc&) {
        return FKD_OUT_OF_MEMORY;
    }
    return FKD_DONE;
}

}  // namespace
}  // namespace fused_kd

using fused_kd::Verb;

int64_t fkd_abi_version(void) { return FKD_ABI_VERSION; }

int64_t fkd_rows_forward(const FkdRows* student, const FkdRows* teacher, const int64_t* targets, const FkdLoss* loss,
                         float* soft, float* hard, float* stats, int64_t threads) {
    const Verb verb(*student, *teacher, targets, *loss, threads);
    return checked(verb, [&] { verb.forward(soft, hard, stats); });
}

int64_t fkd_rows_terms(const FkdRows* student, const FkdRows* teacher, const int64_t* targets, const FkdLoss* loss,
                       const float* stats, float* sums, int64_t threads) {
    const Verb verb(*student, *teacher, targets, *loss, threads);
    return checked(verb, [&] { verb.terms(stats, sums); });
}

int64_t fkd_rows_backward(const FkdRows* student, const FkdRows* teacher, const int64_t* targets, const FkdLoss* loss,
                          const float* stats, const float* grad_soft, const float* grad_hard, const FkdRows* gradient,
                          int64_t threads) {
    const Verb verb(*student, *teacher, targets, *loss, threads);
    return checked(verb, [&] { verb.backward(stats, grad_soft, grad_hard, *gradient); });
}

int64_t fkd_rows_fused(const FkdRows* student, const FkdRows* teacher, const int64_t* targets, const FkdLoss* loss,
                       const float* coef_soft, const float* coef_hard, float* soft, float* hard,
                       const FkdRows* gradient, int64_t threads) {
    const Verb verb(*student, *teacher, targets, *loss, threads);
    return checked(verb, [&] { verb.fused(coef_soft, coef_hard, soft, hard, *gradient); });
}
