#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

#include "../pool.hpp"
#include "thrifty.h"

namespace thrifty {
namespace {

// Elements of a row of x below which a thread more does not pay.
constexpr size_t kGrain = 4 << 10;

struct Rows {
  const float* x;
  size_t x_stride;
  const float* y;
  size_t y_stride;
  size_t n;
  size_t k;
  float* sums;
  int64_t* numbers;
};

/// Bits ordered as the values are; -0 is 0, and a NaN is below everything.
uint32_t ordered(float value) {
  if (value != value) return 0;
  value += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/// A value with its number: larger is better, and of equal values the smaller number.
uint64_t ranked(float value, uint32_t number) { return uint64_t{ordered(value)} << 32 | uint32_t(~number); }
uint32_t number_of(uint64_t rank) { return ~uint32_t(rank); }

/// The best `count` of a stream. What cannot be among them costs a comparison; a full buffer is cut to its best half.
template <size_t kMost>
class Best {
 public:
  explicit Best(size_t count) : count_(count) {}

  void push(uint64_t rank) {
    if (rank <= threshold_) return;
    held_[size_++] = rank;
    if (size_ < 2 * count_) return;
    cut();
    threshold_ = held_[count_ - 1];
  }
  /// Best first.
  const uint64_t* sorted() {
    if (size_ > count_) cut();
    std::sort(held_, held_ + size_, std::greater<uint64_t>());
    return held_;
  }

 private:
  void cut() {
    std::nth_element(held_, held_ + count_ - 1, held_ + size_, std::greater<uint64_t>());
    size_ = count_;
  }

  size_t count_;
  size_t size_ = 0;
  uint64_t threshold_ = 0;
  uint64_t held_[2 * kMost];
};

/// The `count` best of a side, best first.
void best_of(const float* side, size_t n, size_t count, uint32_t* indices) {
  Best<THRIFTY_MOST_CHOSEN + 1> best(count);
  for (size_t i = 0; i < n; ++i) best.push(ranked(side[i], uint32_t(i)));
  const uint64_t* sorted = best.sorted();
  for (size_t i = 0; i < count; ++i) indices[i] = number_of(sorted[i]);
}

/// Sums are rounded, so one beyond the staircase may equal the last chosen: then the pairs of that very sum are taken
/// in the order of their numbers. `better` pairs are above it.
void resolve_ties(const Rows& r, const float* x, const float* y, float best_y, size_t better, float* sums,
                  int64_t* numbers) {
  const uint32_t last = ordered(sums[r.k - 1]);
  size_t slot = better;
  for (size_t i = 0; i < r.n && slot < r.k; ++i) {
    if (ordered(x[i] + best_y) < last) continue;
    for (size_t j = 0; j < r.n && slot < r.k; ++j) {
      if (ordered(x[i] + y[j]) == last) numbers[slot++] = int64_t(i * r.n + j);
    }
  }
}

void choose(const Rows& r, const float* x, const float* y, float* sums, int64_t* numbers) {
  uint32_t xs[THRIFTY_MOST_CHOSEN + 1], ys[THRIFTY_MOST_CHOSEN + 1];
  const size_t side = std::min(r.k + 1, r.n);
  best_of(x, r.n, side, xs);
  best_of(y, r.n, side, ys);
  Best<THRIFTY_MOST_CHOSEN> best(r.k);
  uint32_t beyond = 0;  // the best of the sums just outside of the staircase
  for (size_t i = 0; i < side; ++i) {
    const size_t steps = r.k / (i + 1);
    for (size_t j = 0; j < steps && j < side; ++j) {
      best.push(ranked(x[xs[i]] + y[ys[j]], xs[i] * uint32_t(r.n) + ys[j]));
    }
    if (steps < side) beyond = std::max(beyond, ordered(x[xs[i]] + y[ys[steps]]));
  }
  const uint64_t* sorted = best.sorted();
  const uint32_t last = uint32_t(sorted[r.k - 1] >> 32);
  size_t better = 0;
  for (size_t s = 0; s < r.k; ++s) {
    const uint32_t number = number_of(sorted[s]);
    sums[s] = x[number / r.n] + y[number % r.n];
    numbers[s] = number;
    better += uint32_t(sorted[s] >> 32) > last;
  }
  if (beyond >= last) resolve_ties(r, x, y, y[ys[0]], better, sums, numbers);
}

}  // namespace
}  // namespace thrifty

using namespace thrifty;

int thrifty_product_key_topk(const float* x, int64_t x_stride, const float* y, int64_t y_stride, int64_t rows,
                             int64_t n, int64_t k, float* sums, int64_t* numbers, int n_threads) {
  const bool fits = x && y && sums && numbers && rows >= 0 && n > 0 && n <= 65536 && x_stride >= n && y_stride >= n;
  if (!fits || k < 1 || k > THRIFTY_MOST_CHOSEN || k > n * n) return THRIFTY_BAD_ARGUMENT;
  if (rows == 0) return THRIFTY_OK;
  const Rows r{x, size_t(x_stride), y, size_t(y_stride), size_t(n), size_t(k), sums, numbers};
  run_ranges(size_t(rows), r.n + 8 * r.k, kGrain, n_threads, [&](size_t first, size_t end) {
    for (size_t t = first; t < end; ++t) {
      choose(r, r.x + t * r.x_stride, r.y + t * r.y_stride, r.sums + t * r.k, r.numbers + t * r.k);
    }
  });
  return THRIFTY_OK;
}
