#include "topk.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>

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

constexpr size_t kMostSide = THRIFTY_MOST_CHOSEN + 1;

/// One side's scores, best first, sorted only as far down as they are asked for.
class Side {
 public:
  /// The best `count` of n scores are kept, and few others.
  Side(const float* scores, size_t n, size_t count) : scores_(scores), count_(count) {
    const float least = n > 2 * count ? lower_bound(n) : -std::numeric_limits<float>::infinity();
    uint64_t threshold = 0;
    for (size_t i = 0; i < n; ++i) {
      if (scores[i] < least) continue;
      const uint64_t rank = ranked(scores[i], uint32_t(i));
      if (rank <= threshold) continue;
      held_[size_++] = rank;
      if (size_ < kHeld) continue;
      std::nth_element(held_, held_ + count - 1, held_ + size_, std::greater<uint64_t>());
      size_ = count;
      threshold = held_[count - 1];
    }
    std::make_heap(held_, held_ + size_);
  }

  size_t count() const { return count_; }
  uint32_t index(size_t place) {
    for (; sorted_ <= place; ++sorted_) std::pop_heap(held_, held_ + size_ - sorted_);
    return number_of(held_[size_ - 1 - place]);
  }
  float score(size_t place) { return scores_[index(place)]; }

 private:
  static constexpr size_t kHeld = 2 * kMostSide;

  /// At most the count-th best score, and seldom far below it: the count-th best of the maxima of small groups.
  float lower_bound(size_t n) const {
    const size_t width = std::max<size_t>(1, n / (3 * count_)), groups = n / width;
    float most[6 * kMostSide];
    std::fill(most, most + groups, -std::numeric_limits<float>::infinity());
    for (size_t i = 0; i < width; ++i) {
      const float* row = scores_ + i * groups;
      for (size_t g = 0; g < groups; ++g) most[g] = row[g] > most[g] ? row[g] : most[g];  // a NaN is none
    }
    std::nth_element(most, most + count_ - 1, most + groups, std::greater<float>());
    return most[count_ - 1];
  }

  const float* scores_;
  size_t count_;
  size_t size_ = 0;
  size_t sorted_ = 0;
  uint64_t held_[kHeld];
};

/// The pair of the i-th best of x and the j-th best of y.
struct Pair {
  uint64_t rank;
  uint32_t i;
  uint32_t j;

  bool operator<(const Pair& other) const { return rank < other.rank; }
};

/// Pairs that may come next, the best of them first. A pair is let in when the one above it in its row (for the first
/// of a row: the first of the row before) is taken, for until then that one is at least as good.
class Frontier {
 public:
  Frontier(Side& x, Side& y, uint32_t n) : x_(x), y_(y), n_(n) { add(0, 0); }

  uint64_t best() const { return size_ ? pairs_[0].rank : 0; }
  uint64_t take() {
    std::pop_heap(pairs_, pairs_ + size_);
    const Pair taken = pairs_[--size_];
    if (taken.j + 1 < y_.count()) add(taken.i, taken.j + 1);
    if (taken.j == 0 && taken.i + 1 < x_.count()) add(taken.i + 1, 0);
    return taken.rank;
  }

 private:
  void add(uint32_t i, uint32_t j) {
    pairs_[size_++] = {ranked(x_.score(i) + y_.score(j), x_.index(i) * n_ + y_.index(j)), i, j};
    std::push_heap(pairs_, pairs_ + size_);
  }

  Side& x_;
  Side& y_;
  uint32_t n_;
  size_t size_ = 0;
  Pair pairs_[kMostSide + 1];
};

/// Sums are rounded, so one that was not looked at may equal the last chosen: then the pairs of that very sum are taken
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
  const size_t count = std::min(r.k + 1, r.n);
  const auto n = uint32_t(r.n);
  Side xs(x, r.n, count), ys(y, r.n, count);
  Frontier frontier(xs, ys, n);
  uint64_t ranks[THRIFTY_MOST_CHOSEN];
  for (size_t s = 0; s < r.k; ++s) {
    // Sums come in order; of equal ones, which are neighbours, the smaller number goes first.
    const uint64_t rank = frontier.take();
    size_t place = s;
    for (; place > 0 && ranks[place - 1] < rank; --place) ranks[place] = ranks[place - 1];
    ranks[place] = rank;
  }
  const uint64_t last = ranks[r.k - 1] >> 32;
  size_t better = 0;
  for (size_t s = 0; s < r.k; ++s) {
    const uint32_t number = number_of(ranks[s]);
    sums[s] = x[number / n] + y[number % n];
    numbers[s] = number;
    better += ranks[s] >> 32 > last;
  }
  if (frontier.best() >> 32 >= last) resolve_ties(r, x, y, ys.score(0), better, sums, numbers);
}

}  // namespace

void choose_experts(const float* x, const float* y, size_t n, size_t k, float* sums, int64_t* numbers) {
  choose({x, n, y, n, n, k, sums, numbers}, x, y, sums, numbers);
}

}  // namespace thrifty

using namespace thrifty;

int thrifty_product_key_topk(const float* x, int64_t x_stride, const float* y, int64_t y_stride, int64_t rows,
                             int64_t n, int64_t k, float* sums, int64_t* numbers, int n_threads) {
  const bool fits = x && y && sums && numbers && rows >= 0 && n > 0 && n <= 65536 && x_stride >= n && y_stride >= n;
  if (!fits || k < 1 || k > THRIFTY_MOST_CHOSEN || k > n * n) return THRIFTY_BAD_ARGUMENT;
  if (rows == 0) return THRIFTY_OK;
  const Rows r{x, size_t(x_stride), y, size_t(y_stride), size_t(n), size_t(k), sums, numbers};
  run_ranges(size_t(rows), r.n + 4 * r.k, kGrain, n_threads, [&](size_t first, size_t end) {
    for (size_t t = first; t < end; ++t) {
      choose(r, r.x + t * r.x_stride, r.y + t * r.y_stride, r.sums + t * r.k, r.numbers + t * r.k);
    }
  });
  return THRIFTY_OK;
}
