#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "../formats.hpp"
#include "../pool.hpp"
#include "../vector/scalars.hpp"
#include "cache.hpp"
#include "experts.hpp"
#include "key_score.hpp"
#include "records.hpp"
#include "valid.hpp"

namespace thrifty {
namespace {

using Clock = std::chrono::steady_clock;

/// More threads, and more parts of an op, than these take no part: the parts claimed are bits of a word.
constexpr size_t kMostParts = 64;
/// Parts of an op that a thread is dealt. It takes them in order, one linear stream, and when it is done it takes from
/// the end of what others have left: a thread that lost its core delays nothing but the part it holds.
constexpr size_t kPartsPerThread = 8;
/// The same of a product with so few rows of x that it waits for its weights: each part begins with cold streams.
constexpr size_t kFewRows = 8;
constexpr size_t kStreamsPerThread = 4;
/// Bytes of weights, or of as much work, below which another part does not pay.
constexpr size_t kGrain = 32 << 10;
/// Turns of waiting after which the thread waited for has lost its core.
constexpr int kSpinTurns = 2000;

/// A part of 0 ... count - 1.
struct Range {
  size_t first, end;
};

/// An op, or half of one, that begins when the phase before it is done.
struct Phase {
  std::atomic<uint64_t> claimed;
  std::atomic<uint32_t> done;
};

struct Step {
  const thrifty_op* ops;
  size_t n_ops;
  const thrifty_batch* batch;
  double* seconds;
  const Kernels* kernels;
  size_t threads;
  Phase* phases;  // two for each op
};

/// An op of a step: how many parts it has, and each part. Phase 0 is the op; attention that is split over the cache
/// merges in phase 1.
class Work {
 public:
  Work(const Step& step, size_t op)
      : step_(step), op_(step.ops[op]), batch_(*step.batch), kernels_(*step.kernels), threads_(step.threads) {
    rows_ = size_t(flag(THRIFTY_OUTPUTS) ? batch_.n_outputs : batch_.n);
    if (op_.code == THRIFTY_OP_ATTENTION && rows_ > 0) prepare_attention(op > 0 ? &step.ops[op - 1] : nullptr);
    if (op_.code == THRIFTY_OP_ROPE_CACHE && op + 1 < step.n_ops && step.ops[op + 1].code == THRIFTY_OP_ATTENTION) {
      left_to_next_ = Work(step, op + 1).rope_ != nullptr;
    }
    if (op_.code == THRIFTY_OP_DYNAMIC_MASK) {
      for (size_t row = 0; row < rows_; row = sequence_end(row)) ++items_;
    }
  }

  /// Whether threads make copies of the op's row for themselves, with the product after it.
  bool is_private() const { return flag(THRIFTY_PRIVATE) && rows_ == 1; }
  bool is_product() const { return op_.code == THRIFTY_OP_MATMUL || op_.code == THRIFTY_OP_FLOAT_MATMUL; }

  size_t parts(int phase) const {
    if (rows_ == 0 || (phase == 1 && !split_) || (is_private() && !is_product()) || left_to_next_) return 0;
    const size_t each = is_product() && rows_ <= kFewRows ? kStreamsPerThread : kPartsPerThread;
    const size_t most = threads_ > 1 ? threads_ * each : 1;
    size_t parts = units(phase);
    if (parts > most) parts = most;
    if (parts > kMostParts) parts = kMostParts;
    const size_t worth = work(phase) / kGrain + 1;
    return parts < worth ? parts : worth;
  }

  void run(int phase, size_t part, size_t parts, size_t thread) const {
    const size_t count = units(phase);
    const Range range{count * part / parts, count * (part + 1) / parts};
    const size_t own = is_private() ? thread : 0;
    switch (op_.code) {
      case THRIFTY_OP_EMBED: return embed(range);
      case THRIFTY_OP_QUANTIZE:
      case THRIFTY_OP_RMS_NORM: return normalise(range, own);
      case THRIFTY_OP_MATMUL: return matmul(range, own);
      case THRIFTY_OP_FLOAT_MATMUL: return float_matmul(range, own);
      case THRIFTY_OP_ROPE_CACHE: return kernels_.rope_cache(rope_cache_of(op_, batch_), range.first, range.end);
      case THRIFTY_OP_HEADS: return turn_heads(range);
      case THRIFTY_OP_KEY_SCORES: return key_scores(range);
      case THRIFTY_OP_DYNAMIC_MASK: return dynamic_mask(range);
      case THRIFTY_OP_MLGRU: return kernels_.mlgru(mlgru_of(op_, batch_, rows_), range.first, range.end);
      case THRIFTY_OP_SSD: return kernels_.ssd(ssd_of(op_, batch_, rows_), range.first, range.end);
      case THRIFTY_OP_EXPERTS: return experts(range);
      default: return phase == 1 ? merge(range) : split_ ? split_attention(range) : whole_attention(range);
    }
  }

 private:
  bool flag(int32_t bit) const { return (op_.flags & bit) != 0; }
  size_t n(int i) const { return size_t(op_.n[i]); }
  template <class T>
  T* p(int i) const {
    return static_cast<T*>(op_.p[i]);
  }

  /// What a range counts: rows, tiles (pairs of them where gate and up stay together), items of attention, or, where a
  /// sequence's rows are taken in order, what is apart in each: score heads, columns, heads.
  size_t units(int phase) const {
    if (is_product()) return up_to(n(1), kTileRows) / kTileRows / tiles_per_unit();
    if (op_.code == THRIFTY_OP_ROPE_CACHE || phase == 1) return rows_ * n(1);
    switch (op_.code) {
      case THRIFTY_OP_ATTENTION: return items_;
      case THRIFTY_OP_DYNAMIC_MASK: return items_ * n(3);
      case THRIFTY_OP_MLGRU: return up_to(n(0), 16) / 16;
      case THRIFTY_OP_SSD: return n(0);
      default: return rows_;
    }
  }

  /// Bytes of weights, or what costs as much.
  size_t work(int phase) const {
    const size_t rows = rows_ < 4 ? 1 : rows_ / 4;
    switch (op_.code) {
      case THRIFTY_OP_MATMUL: return n(1) * n(2) / kFormats[op_.n[0]].codes_per_byte * rows;
      case THRIFTY_OP_FLOAT_MATMUL: return n(1) * n(2) * element_bytes(int(op_.n[0])) * rows;
      case THRIFTY_OP_ROPE_CACHE: return rows_ * n(0) * n(2) * 4;
      case THRIFTY_OP_ATTENTION:
        return phase == 1 ? rows_ * n(0) * n(2) * chunks_ : rows_ * n(1) * n(2) * chunks_ * 256;
      case THRIFTY_OP_KEY_SCORES: return rows_ * n(0) * n(1) * 8;
      case THRIFTY_OP_DYNAMIC_MASK: return rows_ * n(0) * n(2) * kChunk;
      case THRIFTY_OP_MLGRU: return rows_ * n(0) * 16;
      case THRIFTY_OP_SSD: return rows_ * n(0) * n(2) * n(3) * 4;
      case THRIFTY_OP_EXPERTS: return rows_ * n(0) * n(1) * n(3) * 4;
      default: return rows_ * n(0) * 4;
    }
  }

  void embed(Range rows) const {
    const size_t d = n(1);
    for (size_t row = rows.first; row < rows.end; ++row) {
      const size_t at = size_t(batch_.tokens[row]) * d;
      float* x = p<float>(1) + row * n(3);
      if (op_.n[2] == THRIFTY_F32) std::memcpy(x, p<const float>(0) + at, d * 4);
      if (op_.n[2] == THRIFTY_BF16) {
        for (size_t i = 0; i < d; ++i) x[i] = widen(p<const Bfloat>(0)[at + i]);
      }
      if (op_.n[2] == THRIFTY_F16) {
        for (size_t i = 0; i < d; ++i) x[i] = widen(p<const Half>(0)[at + i]);
      }
      if (op_.n[2] == THRIFTY_Q8_0) dequantize_q8_0(p<const Q8Block>(0) + at / kQ8Weights, d, x);
    }
  }

  // QUANTIZE and RMS_NORM differ in what becomes of the normalised rows.
  void normalise(Range rows, size_t own) const {
    const bool codes = op_.code == THRIFTY_OP_QUANTIZE;
    const bool norm = !codes || flag(THRIFTY_NORM);
    const TokenRows t{p<const float>(0), p<const float>(1), op_.f[0], norm, n(0), n(1), p<int8_t>(2), n(2),
                      p<float>(3),       p<float>(2)};
    const auto run = codes ? kernels_.quantize : kernels_.rms_norm;
    if (!flag(THRIFTY_GATHER) && !is_private()) return run(t, rows.first, rows.end);
    for (size_t row = rows.first; row < rows.end; ++row) {
      TokenRows one = t;
      const size_t to = row + own;
      one.x += (flag(THRIFTY_GATHER) ? size_t(batch_.outputs[row]) : row) * t.x_stride;
      if (codes) {
        one.codes += to * t.stride;
        one.scales += to;
      } else {
        one.y += to * t.stride;
      }
      run(one, 0, 1);
    }
  }

  size_t tiles_per_unit() const { return op_.n[6] == THRIFTY_GATE_UP ? 2 : 1; }
  Output output() const {
    return {p<float>(5), n(4), n(5), p<const float>(2), int(op_.n[6]), int(op_.n[7]), p<const float>(6)};
  }

  void matmul(Range units, size_t own) const {
    const size_t block_cols = kFormats[op_.n[0]].col_multiple;
    const TernaryMatmul m{p<const uint8_t>(0),
                          up_to(n(2), block_cols) / block_cols,
                          up_to(n(1), kTileRows),
                          p<const float>(1),
                          true,
                          p<const int8_t>(3) + own * n(3),
                          n(3),
                          p<const float>(4) + own,
                          rows_,
                          output()};
    kernels_.matmul[op_.n[0]](m, units.first * tiles_per_unit(), units.end * tiles_per_unit());
  }

  void float_matmul(Range units, size_t own) const {
    const FloatMatmul m{p<const void>(0), int(op_.n[0]), n(1), n(2), p<const float>(3) + own * n(3), n(3), rows_,
                        output()};
    kernels_.float_matmul(m, units.first * tiles_per_unit(), units.end * tiles_per_unit());
  }

  void turn_heads(Range rows) const {
    const size_t d = n(2);
    const auto each = [&](float* x, size_t count, const float* gain, size_t position) {
      const TokenRows norm{x, gain, op_.f[0], true, d, d, nullptr, d, nullptr, x};
      if (gain) kernels_.rms_norm(norm, 0, count);
      const size_t at = position * (d / 2);
      if (p<float>(1)) kernels_.turn_heads(x, p<const float>(1) + at, p<const float>(2) + at, d, count);
    };
    for (size_t row = rows.first; row < rows.end; ++row) {
      float* x = p<float>(0) + row * n(3);
      each(x, n(0), p<const float>(3), size_t(batch_.positions[row]));
      each(x + n(4), n(1), p<const float>(4), size_t(batch_.positions[row]));
    }
  }

  void key_scores(Range rows) const {
    const size_t width = n(0), heads = n(1);
    for (size_t row = rows.first; row < rows.end; ++row) {
      for (size_t head = 0; head < heads; ++head) {
        const double bias = p<const float>(3) ? double(p<const float>(3)[head]) : 0,
                     A = double(p<const float>(1)[head]);
        p<float>(4)[row * heads + head] =
            key_score(p<const float>(0) + row * n(2), p<const float>(2) + head * width, width, bias, A);
      }
    }
  }

  size_t sequence_end(size_t row) const {
    size_t end = row + 1;
    while (end < rows_ && batch_.slots[end] == batch_.slots[row]) ++end;
    return end;
  }

  void dynamic_mask(Range items) const {
    const DynamicMask m{{n(0), n(3), n(2), n(7), int(op_.n[5])},
                        &batch_,
                        n(1),
                        n(4),
                        n(8),
                        n(6),
                        p<const float>(0),
                        p<const float>(1),
                        p<const float>(2),
                        p<const float>(3),
                        p<float>(4),
                        op_.f[0]};
    size_t item = 0;
    for (size_t row = 0; row < rows_; row = sequence_end(row)) {
      for (size_t head = 0; head < n(3); ++head, ++item) {
        if (item >= items.first && item < items.end) kernels_.dynamic_mask(m, row, sequence_end(row), head);
      }
    }
  }

  void experts(Range rows) const {
    const RoutedExperts e{n(0),
                          n(1),
                          n(2),
                          n(3),
                          int(op_.n[4]),
                          int(op_.n[5]),
                          op_.n[6] != 0,
                          p<const void>(2),
                          p<const void>(3),
                          p<const float>(6)};
    for (size_t row = rows.first; row < rows.end; ++row) {
      add_experts(e, kernels_, p<const float>(0) + row * n(7), p<const float>(1) + row * 2 * n(0) * n(2),
                  p<const float>(4) + row * n(3), p<float>(5) + row * n(3), p<float>(7) + row * n(8));
    }
  }

  size_t chunks(size_t row) const { return (size_t(batch_.positions[row]) + kChunk) / kChunk; }

  Attention attention() const {
    return {heads_of(op_), &batch_, p<const float>(0), n(5), p<float>(1), n(6), op_.f[0], p<float>(2), chunks_};
  }

  /// Rows of one sequence from `row` on that are held against its cache together.
  size_t block_rows(size_t row) const {
    // As many as share the widening of a chunk, where that leaves parts enough for the threads.
    const bool wide = rows_ * n(0) >= 4 * kQueries * kPartsPerThread * threads_;
    const size_t group = n(0) / n(1), queries = wide ? kBlockQueries : kQueries;
    const size_t most = group < queries ? queries / group : 1;
    size_t end = row + 1;
    while (end < rows_ && end - row < most && batch_.slots[end] == batch_.slots[row]) ++end;
    return end - row;
  }

  /// Chooses between whole rows and their chunks; the bits are the same. With many heads and rows, whole ones share the
  /// work well enough, and need no merge.
  void prepare_attention(const thrifty_op* before) {
    size_t all_chunks = 0, blocks = 0;
    for (size_t row = 0; row < rows_; ++row) {
      all_chunks += chunks(row);
      chunks_ = chunks(row) > chunks_ ? chunks(row) : chunks_;
    }
    const size_t part = up_to(n(2), 16) + 16;
    split_ = threads_ > 1 && chunks_ > 1 && rows_ * n(1) < kPartsPerThread * threads_ &&
             rows_ * n(0) * chunks_ * part <= n(7);
    if (split_) {
      items_ = all_chunks * n(1);
      return;
    }
    for (size_t row = 0; row < rows_; row += block_rows(row)) ++blocks;
    items_ = blocks * n(1);
    if (before && turns_same(*before) && one_row_each()) rope_ = before;
  }

  /// Whether an op turns the queries of this attention, and writes to its cache.
  bool turns_same(const thrifty_op& op) const {
    return op.code == THRIFTY_OP_ROPE_CACHE && op.flags == op_.flags && op.p[0] == op_.p[0] &&
           std::equal(op.n, op.n + 6, op_.n);
  }

  bool one_row_each() const { return std::adjacent_find(batch_.slots, batch_.slots + rows_) == batch_.slots + rows_; }

  // Head by head, so that a thread's blocks of rows meet the same keys.
  void whole_attention(Range items) const {
    const Attention a = attention();
    const size_t blocks = items_ / n(1);
    for (size_t row = 0, block = 0, rows; row < rows_; row += rows, ++block) {
      rows = block_rows(row);
      for (size_t head = 0; head < n(1); ++head) {
        const size_t item = head * blocks + block;
        if (item < items.first || item >= items.end) continue;
        const size_t pair = row * n(1) + head;
        if (rope_) kernels_.rope_cache(rope_cache_of(*rope_, batch_), pair, pair + 1);
        kernels_.attend(a, row, rows, head);
      }
    }
  }

  void split_attention(Range items) const {
    const Attention a = attention();
    size_t item = 0;
    for (size_t row = 0; row < rows_; ++row) {
      for (size_t head = 0; head < n(1); ++head) {
        const size_t end = item + chunks(row), from = item > items.first ? item : items.first;
        const size_t to = end < items.end ? end : items.end;
        if (from < to) kernels_.attend_chunks(a, row, head, from - item, to - item);
        item = end;
      }
    }
  }

  void merge(Range items) const {
    const Attention a = attention();
    for (size_t item = items.first; item < items.end; ++item) kernels_.merge_chunks(a, item / n(1), item % n(1));
  }

  const Step& step_;
  const thrifty_op& op_;
  const thrifty_batch& batch_;
  const Kernels& kernels_;
  size_t threads_, rows_;
  bool split_ = false;
  size_t chunks_ = 0, items_ = 0;
  /// Of an attention that goes by heads, over one row of each sequence: the op that turns them, done head by head with
  /// it. Nothing else reads what a head of one row has written.
  const thrifty_op* rope_ = nullptr;
  bool left_to_next_ = false;
};

/// One thread's way through the phases of a step.
class Runner {
 public:
  Runner(const Step& step, size_t thread) : step_(step), thread_(thread) {}

  void run() {
    const bool timed = thread_ == 0 && step_.seconds != nullptr;
    auto before = timed ? Clock::now() : Clock::time_point();
    for (size_t op = 0; op < step_.n_ops; ++op) {
      const Work work(step_, op);
      for (int phase = 0; phase < 2; ++phase) {
        const size_t parts = work.parts(phase);
        if (parts == 0) continue;
        if (step_.threads == 1) {
          take(work, op, phase, 0, parts);
          continue;
        }
        take_some(work, op, phase, parts);
        wait(step_.phases[2 * op + size_t(phase)], parts);
      }
      if (timed) {
        const auto now = Clock::now();
        step_.seconds[op] = std::chrono::duration<double>(now - before).count();
        before = now;
      }
    }
  }

 private:
  void take(const Work& work, size_t op, int phase, size_t part, size_t parts) {
    if (work.is_private() && work.is_product() && prepared_ != op) {
      // A part is held, so that the op is not done and nobody changes what the copy is made of.
      prepared_ = op;
      Work(step_, op - 1).run(0, 0, 1, thread_);
    }
    work.run(phase, part, parts, thread_);
  }

  void take_some(const Work& work, size_t op, int phase, size_t parts) {
    Phase& shared = step_.phases[2 * op + size_t(phase)];
    const size_t first = parts * thread_ / step_.threads, end = parts * (thread_ + 1) / step_.threads;
    const uint64_t all = parts == kMostParts ? ~uint64_t{0} : (uint64_t{1} << parts) - 1;
    uint32_t done = 0;
    uint64_t left = all;
    for (size_t next = first; left != 0;) {
      size_t part;
      if (next < end) {
        part = next++;
      } else {
        part = kMostParts - 1;
        while (!(left >> part & 1)) --part;
      }
      const uint64_t bit = uint64_t{1} << part;
      const uint64_t claimed = shared.claimed.fetch_or(bit, std::memory_order_relaxed);
      left = all & ~(claimed | bit);
      if (claimed & bit) continue;
      take(work, op, phase, part, parts);
      ++done;
    }
    // Once, since nobody goes on before no part is left.
    if (done > 0) shared.done.fetch_add(done, std::memory_order_release);
  }

  static void wait(const Phase& phase, size_t parts) {
    for (int turn = 0; phase.done.load(std::memory_order_acquire) < parts; ++turn) {
      relax();
      if (turn > kSpinTurns) std::this_thread::yield();
    }
  }

  const Step& step_;
  const size_t thread_;
  size_t prepared_ = SIZE_MAX;
};

void run_part(const void* context, int part, int) { Runner(*static_cast<const Step*>(context), size_t(part)).run(); }

}  // namespace
}  // namespace thrifty

using namespace thrifty;

size_t thrifty_cache_size(int dtype, int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t capacity) {
  if (dtype < 0 || dtype == THRIFTY_BF16 || dtype > THRIFTY_INT8 || layers < 0 || kv_heads < 1 || head_dim < 1)
    return 0;
  if (dtype == THRIFTY_INT8 && head_dim > int64_t{kMostInt8Dim}) return 0;
  if (capacity < 0 || capacity % THRIFTY_CACHE_BLOCK != 0) return 0;
  const Heads heads{size_t(kv_heads), size_t(kv_heads), size_t(head_dim), 0, dtype};
  return size_t(layers) * HeadCache::layer_bytes(heads, size_t(capacity));
}

int thrifty_run(const thrifty_op* ops, int64_t n_ops, const thrifty_batch* batch, int n_threads, double* seconds) {
  if (!ops || !batch || n_ops < 0 || n_ops > THRIFTY_MOST_OPS) return THRIFTY_BAD_ARGUMENT;
  for (int64_t i = 0; i < n_ops; ++i) {
    if (!valid_op(ops[i])) return THRIFTY_BAD_ARGUMENT;
  }
  if (!valid_pairs(ops, n_ops)) return THRIFTY_BAD_ARGUMENT;
  if (!valid_batch(*batch, ops, size_t(n_ops))) return THRIFTY_BAD_ARGUMENT;
  if (batch->n == 0) return THRIFTY_OK;
  const int most = int(kMostParts), threads = n_threads < 1 ? 1 : n_threads > most ? most : n_threads;
  Phase phases[2 * THRIFTY_MOST_OPS];
  for (int64_t i = 0; i < 2 * n_ops; ++i) {
    phases[i].claimed.store(0, std::memory_order_relaxed);
    phases[i].done.store(0, std::memory_order_relaxed);
  }
  const Step step{ops, size_t(n_ops), batch, seconds, &kernels(), size_t(threads), phases};
  if (threads == 1) {
    run_part(&step, 0, 1);
  } else {
    run_parts(threads, 1, run_part, &step);
  }
  return THRIFTY_OK;
}
