#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "../formats.hpp"
#include "../pool.hpp"
#include "../vector/scalars.hpp"
#include "cache.hpp"

namespace thrifty {
namespace {

using Clock = std::chrono::steady_clock;

/// More threads, and more parts of an op, than these take no part: the parts claimed are bits of a word.
constexpr size_t kMostParts = 64;
/// Parts of an op that a thread is dealt. It takes them in order, one linear stream, and when it is done it takes from
/// the end of what others have left: a thread that lost its core delays nothing but the part it holds.
constexpr size_t kPartsPerThread = 8;
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
    if (op_.code == THRIFTY_OP_ATTENTION && rows_ > 0) prepare_attention();
  }

  /// Whether threads make copies of the op's row for themselves, with the product after it.
  bool is_private() const { return flag(THRIFTY_PRIVATE) && rows_ == 1; }
  bool is_product() const { return op_.code == THRIFTY_OP_MATMUL || op_.code == THRIFTY_OP_FLOAT_MATMUL; }

  size_t parts(int phase) const {
    if (rows_ == 0 || (phase == 1 && !split_) || (is_private() && !is_product())) return 0;
    const size_t most = threads_ > 1 ? threads_ * kPartsPerThread : 1;
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
      case THRIFTY_OP_ROPE_CACHE: return rope_cache(range);
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

  /// What a range counts: rows, tiles (pairs of them where gate and up stay together), or items of attention.
  size_t units(int phase) const {
    if (is_product()) return up_to(n(1), kTileRows) / kTileRows / tiles_per_unit();
    if (op_.code == THRIFTY_OP_ROPE_CACHE || phase == 1) return rows_ * n(1);
    return op_.code == THRIFTY_OP_ATTENTION ? items_ : rows_;
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
  Output output() const { return {p<float>(5), n(4), n(5), p<const float>(2), int(op_.n[6]), int(op_.n[7])}; }

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

  Heads heads() const { return {n(0), n(1), n(2), n(3), int(op_.n[4])}; }

  void rope_cache(Range items) const {
    const RopeCache r{heads(), &batch_, p<float>(0), n(5), n(6), n(7), p<const float>(1), p<const float>(2)};
    kernels_.rope_cache(r, items.first, items.end);
  }

  size_t chunks(size_t row) const { return (size_t(batch_.positions[row]) + kChunk) / kChunk; }

  Attention attention() const {
    return {heads(), &batch_, p<const float>(0), n(5), p<float>(1), n(6), op_.f[0], p<float>(2), chunks_};
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
  void prepare_attention() {
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
  }

  // Head by head, so that a thread's blocks of rows meet the same keys.
  void whole_attention(Range items) const {
    const Attention a = attention();
    const size_t blocks = items_ / n(1);
    for (size_t row = 0, block = 0, rows; row < rows_; row += rows, ++block) {
      rows = block_rows(row);
      for (size_t head = 0; head < n(1); ++head) {
        const size_t item = head * blocks + block;
        if (item >= items.first && item < items.end) kernels_.attend(a, row, rows, head);
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
    for (size_t next = first;;) {
      const uint64_t left = all & ~shared.claimed.load(std::memory_order_relaxed);
      if (left == 0) return;
      size_t part;
      if (next < end) {
        part = next++;
      } else {
        part = kMostParts - 1;
        while (!(left >> part & 1)) --part;
      }
      const uint64_t bit = uint64_t{1} << part;
      if (shared.claimed.fetch_or(bit, std::memory_order_relaxed) & bit) continue;
      take(work, op, phase, part, parts);
      shared.done.fetch_add(1, std::memory_order_release);
    }
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

bool valid_epilogue(const thrifty_op& op) { return op.n[6] <= THRIFTY_GATE_UP && op.n[7] <= THRIFTY_RELU2; }

bool valid_heads(const thrifty_op& op) {
  const bool dtype = op.n[4] == THRIFTY_F32 || op.n[4] == THRIFTY_F16 || op.n[4] == THRIFTY_INT8;
  const bool wide = op.n[4] == THRIFTY_INT8 && op.n[2] > int64_t{kMostInt8Dim};
  return op.n[1] > 0 && op.n[0] % op.n[1] == 0 && op.n[2] > 0 && dtype && !wide && op.p[0] && op.p[1] && op.p[2];
}

bool valid_op(const thrifty_op& op) {
  for (int64_t n : op.n) {
    if (n < 0) return false;
  }
  switch (op.code) {
    case THRIFTY_OP_EMBED: return op.p[0] && op.p[1] && op.n[2] <= THRIFTY_F16;
    case THRIFTY_OP_QUANTIZE: return op.p[0] && op.p[2] && op.p[3] && op.n[2] >= op.n[0] && op.n[0] > 0;
    case THRIFTY_OP_RMS_NORM: return op.p[0] && op.p[2] && op.n[0] > 0;
    case THRIFTY_OP_MATMUL:
      return op.n[0] < THRIFTY_FORMAT_COUNT && op.n[0] != THRIFTY_ROW_BLOCK && valid_shape(op.n[1], op.n[2]) &&
             op.n[2] <= kFormats[op.n[0]].most_cols &&
             op.n[3] >= int64_t(round_up(size_t(op.n[2]), kFormats[op.n[0]].col_multiple)) && valid_epilogue(op) &&
             op.p[0] && op.p[1] && op.p[3] && op.p[4] && op.p[5];
    case THRIFTY_OP_FLOAT_MATMUL: return op.n[0] <= THRIFTY_F16 && valid_epilogue(op) && op.p[0] && op.p[3] && op.p[5];
    case THRIFTY_OP_ROPE_CACHE: return valid_heads(op) && op.n[2] % 2 == 0;
    case THRIFTY_OP_ATTENTION: return valid_heads(op);
    default: return false;
  }
}

// A private op is one of a pair: what makes the copy, and the product that reads it.
bool valid_pairs(const thrifty_op* ops, int64_t n_ops) {
  constexpr int32_t common = THRIFTY_PRIVATE | THRIFTY_OUTPUTS;
  for (int64_t i = 0; i < n_ops; ++i) {
    if (!(ops[i].flags & THRIFTY_PRIVATE)) continue;
    const bool codes = ops[i].code == THRIFTY_OP_QUANTIZE;
    if (!codes && ops[i].code != THRIFTY_OP_RMS_NORM) return false;
    const thrifty_op* product = &ops[++i];
    if (i == n_ops || product->code != (codes ? THRIFTY_OP_MATMUL : THRIFTY_OP_FLOAT_MATMUL)) return false;
    if ((product->flags & common) != (ops[i - 1].flags & common)) return false;
  }
  return true;
}

bool valid_batch(const thrifty_batch& b, const thrifty_op* ops, size_t n_ops) {
  if (b.n < 0 || !b.tokens || !b.positions || !b.slots || !b.caches || b.n_outputs < 0) return false;
  if (b.n_outputs > 0 && !b.outputs) return false;
  for (int64_t i = 0; i < b.n; ++i) {
    if (b.slots[i] < 0 || b.slots[i] >= b.n_caches || b.positions[i] < 0) return false;
    if (b.positions[i] >= b.caches[b.slots[i]].capacity) return false;
  }
  for (int64_t i = 0; i < b.n_outputs; ++i) {
    if (b.outputs[i] < 0 || b.outputs[i] >= b.n) return false;
  }
  for (int64_t i = 0; i < b.n_caches; ++i) {
    if (!b.caches[i].base || b.caches[i].capacity % THRIFTY_CACHE_BLOCK != 0) return false;
  }
  for (size_t op = 0; op < n_ops; ++op) {
    if (ops[op].code != THRIFTY_OP_EMBED) continue;
    for (int64_t i = 0; i < b.n; ++i) {
      if (b.tokens[i] < 0 || b.tokens[i] >= ops[op].n[0]) return false;
    }
  }
  return true;
}

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
