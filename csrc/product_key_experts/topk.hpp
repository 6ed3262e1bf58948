#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../kernels.hpp"

namespace thrifty {
namespace {

/// Order keys: integers ordered as the values are; -0 is 0, and a NaN is below everything.
constexpr int32_t kNanKey = std::numeric_limits<int32_t>::min();

inline int32_t key_of(float value) {
  const float positive_zero = value + 0.0f;
  int32_t bits;
  std::memcpy(&bits, &positive_zero, 4);
  const int32_t key = bits ^ int32_t(uint32_t(bits >> 31) >> 1);
  return value != value ? kNanKey : key;
}

inline float value_of(int32_t key) {
  const int32_t bits = key ^ int32_t(uint32_t(key >> 31) >> 1);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline size_t count_from(const int32_t* keys, size_t n, int32_t least) {
  uint32_t found = 0;
  for (size_t i = 0; i < n; ++i) found += keys[i] >= least;
  return found;
}

/// A bound that at least `count` of the n keys reach, and no more than `most` of them unless the bound is the count-th
/// best key itself. Halves the values first, which is quick where they are spread evenly, and then the keys.
inline int32_t bound_of(const int32_t* keys, size_t n, size_t count, size_t most) {
  int32_t low = std::numeric_limits<int32_t>::max(), best = kNanKey;
  for (size_t i = 0; i < n; ++i) {
    low = keys[i] < low ? keys[i] : low;
    best = keys[i] > best ? keys[i] : best;
  }
  constexpr int kHalvingsOfValues = 16;
  int64_t high = int64_t{best} + 1;
  for (int turn = 0; high - low > 1; ++turn) {
    int64_t middle = key_of(0.5f * value_of(low) + 0.5f * value_of(int32_t(high)));
    if (turn >= kHalvingsOfValues || middle <= low || middle >= high) middle = low + (high - low) / 2;
    const size_t found = count_from(keys, n, int32_t(middle));
    if (found < count) {
      high = middle;
      continue;
    }
    low = int32_t(middle);
    if (found <= most) break;
  }
  return low;
}

/// Keys with their numbers, `kMost` at most.
template <size_t kMost>
struct Ranked {
  static constexpr size_t kBlock = 16;
  size_t size = 0;
  int32_t keys[kMost + kBlock];
  uint32_t numbers[kMost + kBlock];

  /// Leaves keys above a bound, and the first `equals` of those equal to it.
  void keep(int32_t bound, size_t equals) {
    size_t kept = 0;
    for (size_t i = 0; i < size; ++i) {
      const bool equal = keys[i] == bound && equals > 0, wanted = equal || keys[i] > bound;
      equals -= equal;
      keys[kept] = keys[i];
      numbers[kept] = numbers[i];
      kept += wanted;
    }
    size = kept;
  }

  /// The best first, and of equal keys the smaller number. A key's place is the count of those above it.
  void sort() {
    for (size_t i = size; i < size + kBlock; ++i) keys[i] = kNanKey;
    uint32_t places[kMost + kBlock];
    for (size_t block = 0; block < size; block += kBlock) {
      uint32_t above[kBlock] = {};
      for (size_t i = 0; i < size; ++i) {
        for (size_t lane = 0; lane < kBlock; ++lane) above[lane] += keys[i] > keys[block + lane];
      }
      std::memcpy(places + block, above, sizeof above);
    }
    int32_t sorted_keys[kMost];
    uint32_t sorted_numbers[kMost];
    uint32_t equals[kMost];
    std::memset(equals, 0, size * sizeof(uint32_t));
    for (size_t i = 0; i < size; ++i) {
      const uint32_t first = places[i];
      uint32_t place = first + equals[first]++;
      sorted_keys[place] = keys[i];
      for (; place > first && sorted_numbers[place - 1] > numbers[i]; --place) {
        sorted_numbers[place] = sorted_numbers[place - 1];
      }
      sorted_numbers[place] = numbers[i];
    }
    std::memcpy(keys, sorted_keys, size * sizeof(int32_t));
    std::memcpy(numbers, sorted_numbers, size * sizeof(uint32_t));
  }
};

constexpr size_t kMostSide = THRIFTY_MOST_CHOSEN + 1;

/// The best `count` of one side's n scores, best first, and perhaps some more.
struct Side {
  static constexpr size_t kHeld = 3 * kMostSide;
  Ranked<kHeld> held;
  float scores[kHeld];

  Side(const float* x, size_t n, size_t count) {
    int32_t least = lower_bound(x, n, count);
    for (size_t i = 0; i < n; i += kBlock) {
      if (held.size > kHeld - kBlock) least = cut(count) + 1;
      add(x + i, uint32_t(i), n - i < kBlock ? n - i : kBlock, least);
    }
    if (held.size > count + count / 2) cut(count);
    held.sort();
    for (size_t i = 0; i < held.size; ++i) scores[i] = value_of(held.keys[i]);
  }

  size_t size() const { return held.size; }

 private:
  static constexpr size_t kBlock = 16;

  /// Those of some scores, the first of which is x's `number`-th, that reach a bound.
  void add(const float* x, uint32_t number, size_t count, int32_t least) {
    int32_t keys[kBlock];
    size_t size = held.size;
    for (size_t i = 0; i < count; ++i) keys[i] = key_of(x[i]);
    if (count_from(keys, count, least) == 0) return;
    for (size_t i = 0; i < count; ++i) {
      held.keys[size] = keys[i];
      held.numbers[size] = number + uint32_t(i);
      size += keys[i] >= least;
    }
    held.size = size;
  }

  /// At most the count-th best score, and seldom far below it: that of the maxima of small groups.
  static int32_t lower_bound(const float* x, size_t n, size_t count) {
    if (n <= count) return kNanKey;
    const size_t width = n < 3 * count ? 1 : n / (3 * count), groups = n / width;
    int32_t most[6 * kMostSide];
    for (size_t g = 0; g < groups; ++g) most[g] = key_of(x[g]);
    for (size_t i = 1; i < width; ++i) {
      const float* row = x + i * groups;
      for (size_t g = 0; g < groups; ++g) {
        const int32_t key = key_of(row[g]);
        most[g] = key > most[g] ? key : most[g];
      }
    }
    return bound_of(most, groups, count, count + count / 8);
  }

  /// Leaves the best `count` and returns the last one's key: the smaller numbers of those equal to it.
  int32_t cut(size_t count) {
    const int32_t last = bound_of(held.keys, held.size, count, 0);
    held.keep(last, count - count_from(held.keys, held.size, last + 1));
    return last;
  }
};

/// Pairs of ranks that may be among the best k: (i + 1)(j + 1) <= k.
struct Staircase {
  // The sum of 512 / i, i = 1 ... 512, each rounded down.
  static constexpr size_t kMostPairs = 3280;
  Ranked<kMostPairs> pairs;

  Staircase(const Side& x, const Side& y, uint32_t n, size_t k) {
    // As far as the square root of k by rows, the rest by columns: long stretches both.
    size_t corner = 1;
    while ((corner + 1) * (corner + 1) <= k) ++corner;
    for (size_t i = 0; i < corner && i < x.size(); ++i) add(x, i, y, 0, k / (i + 1), n, 1);
    for (size_t j = 0; j < corner && j < y.size(); ++j) add(y, j, x, corner, k / (j + 1), 1, n);
  }

  /// The best key outside: each pair there is below or right of a corner of the stairs.
  static int32_t best_outside(const Side& x, const Side& y, size_t k) {
    int32_t best = kNanKey;
    for (size_t i = 0; i <= k && i < x.size(); ++i) {
      const size_t j = k / (i + 1);
      if (j >= y.size()) continue;
      const int32_t key = key_of(x.scores[i] + y.scores[j]);
      best = key > best ? key : best;
    }
    return best;
  }

 private:
  /// One score of side a with those of ranks first ... end - 1 of side b.
  void add(const Side& a, size_t rank, const Side& b, size_t first, size_t end, uint32_t step_a, uint32_t step_b) {
    if (end > b.size()) end = b.size();
    if (end <= first) return;
    const float score = a.scores[rank];
    const uint32_t number = a.held.numbers[rank] * step_a;
    int32_t* keys = pairs.keys + pairs.size;
    uint32_t* numbers = pairs.numbers + pairs.size;
    for (size_t i = 0; i < end - first; ++i) {
      keys[i] = key_of(score + b.scores[first + i]);
      numbers[i] = number + b.held.numbers[first + i] * step_b;
    }
    pairs.size += end - first;
  }
};

/// The pairs of the sum `last`, in the order of their numbers, go to the slots from `better` on.
inline void resolve_ties(const float* x, const float* y, size_t n, size_t k, float best_y, int32_t last, size_t better,
                         int64_t* numbers) {
  size_t slot = better;
  for (size_t i = 0; i < n && slot < k; ++i) {
    if (key_of(x[i] + best_y) < last) continue;
    for (size_t j = 0; j < n && slot < k; ++j) {
      if (key_of(x[i] + y[j]) == last) numbers[slot++] = int64_t(i * n + j);
    }
  }
}

/// One row of thrifty_product_key_topk.
inline void choose(const float* x, const float* y, size_t n, size_t k, float* sums, int64_t* numbers) {
  const size_t count = k + 1 < n ? k + 1 : n;
  const Side xs(x, n, count), ys(y, n, count);
  Staircase stairs(xs, ys, uint32_t(n), k);
  auto& best = stairs.pairs;
  const int32_t bound = bound_of(best.keys, best.size, k, k);
  const bool many_equal = count_from(best.keys, best.size, bound) > 2 * k;
  best.keep(bound, many_equal ? 0 : best.size);
  best.sort();
  for (size_t s = 0; s < k; ++s) {
    sums[s] = value_of(s < best.size ? best.keys[s] : bound);
    numbers[s] = s < best.size ? best.numbers[s] : 0;
  }
  // Sums are rounded, so one outside of the stairs may equal the last chosen, with a smaller number.
  const int32_t last = many_equal ? bound : best.keys[k - 1];
  if (!many_equal && Staircase::best_outside(xs, ys, k) < last) return;
  size_t better = 0;
  while (better < k && key_of(sums[better]) > last) ++better;
  resolve_ties(x, y, n, k, ys.scores[0], last, better, numbers);
}

}  // namespace
}  // namespace thrifty
