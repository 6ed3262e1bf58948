#pragma once

#include <cmath>
#include <type_traits>

#include "../step/cache.hpp"
#include "../vector/math.hpp"

namespace thrifty {
namespace {

/// Softmax of a query over one chunk, or over several merged ones.
struct Softmax {
  float m;  // largest score
  float l;  // sum of exp(score - m)
};

/// Factors of two parts in their merge.
struct Merge {
  float kept;
  float added;
};

template <class V>
float exp_of(float x) {
  alignas(64) float lane[16];
  V::store(lane, exp_negative<V>(V::set(x)));
  return lane[0];
}

template <class V>
Merge merge(Softmax& total, const Softmax& chunk) {
  const float m = total.m > chunk.m ? total.m : chunk.m;
  const Merge f{exp_of<V>(total.m - m), exp_of<V>(chunk.m - m)};
  total = {m, total.l * f.kept + chunk.l * f.added};
  return f;
}

/// Queries of one kv head: those of one or several rows of a sequence, held against a chunk together.
struct Queries {
  size_t count = 0;
  const float* q[kQueries];
  float* y[kQueries];       // [d], where the weighted values go
  size_t length[kQueries];  // positions that the query sees
  Softmax total[kQueries];
  bool begun[kQueries];

  void add(const float* query, float* out, size_t positions) {
    q[count] = query;
    y[count] = out;
    length[count] = positions;
    begun[count] = false;
    ++count;
  }
};

/// Positions that the query seeing most of them sees.
inline size_t longest_of(const Queries& set) {
  size_t most = 0;
  for (size_t i = 0; i < set.count; ++i) most = set.length[i] > most ? set.length[i] : most;
  return most;
}

/// End of the run of queries from `first` on that see the same positions, as those of one row do.
inline size_t same_length(const Queries& set, size_t first) {
  size_t end = first;
  while (end < set.count && set.length[end] == set.length[first]) ++end;
  return end;
}

/// Takes a chunk's softmax into query i's, and gives the factors of their values where there were any before.
template <class V>
Merge add_part(Queries& set, size_t i, const Softmax& part) {
  Merge factors{0.0f, 1.0f};
  if (set.begun[i]) {
    factors = merge<V>(set.total[i], part);
  } else {
    set.total[i] = part;
  }
  set.begun[i] = true;
  return factors;
}

/// Calls body.operator()<n>(first) for runs of kMost (a power of two), of half as many and so on to 1, of `count`.
template <int kMost, class Body>
void in_runs(size_t count, const Body& body, size_t first = 0) {
  for (; count - first >= size_t{kMost}; first += size_t{kMost}) body(std::integral_constant<int, kMost>(), first);
  if constexpr (kMost > 1) {
    if (first < count) in_runs<kMost / 2>(count, body, first);
  }
}

}  // namespace
}  // namespace thrifty
