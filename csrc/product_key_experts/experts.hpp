#pragma once

#include "../kernels.hpp"
#include "../prefetch.hpp"
#include "../vector/math.hpp"

namespace thrifty {
namespace {

/// Rows that go through the registers at once, as many as there are chains of additions to hide their latency. While a
/// group is read, the next one is fetched, line by line: rows lie anywhere, where no hardware looks ahead.
template <class V, class T>
struct ExpertGroup {
  static constexpr size_t kSize = 2 * V::kBlocks;
  const T* row[kSize];

  ExpertGroup(const void* table, const int64_t* indices, size_t count, size_t d) {
    for (size_t r = 0; r < kSize; ++r) {
      row[r] = static_cast<const T*>(table) + size_t(indices[r < count ? r : 0]) * d;
    }
  }
  void fetch(size_t column) const {
    if (column * sizeof(T) % 64 != 0) return;
    for (const T* from : row) prefetch(from + column);
  }
};

/// The group after the one at `slot` in a table, or the first of `after` where this table's are done.
template <class V, class T>
ExpertGroup<V, T> group_at(const ProductKeyExperts& e, const void* table, const void* after, const int64_t* indices,
                           size_t slot) {
  if (slot >= e.k) return {after, indices, e.k, e.d};
  return {table, indices + slot, e.k - slot, e.d};
}

/// hidden_s = x . down_s.
template <class V, class T>
void expert_dots(const ProductKeyExperts& e, const float* x, const int64_t* indices, float* hidden) {
  constexpr size_t kGroup = ExpertGroup<V, T>::kSize;
  const void* after = e.up ? e.up : e.down;
  auto next = group_at<V, T>(e, e.down, after, indices, 0);
  for (size_t slot = 0; slot < e.k; slot += kGroup) {
    const auto group = next;
    next = group_at<V, T>(e, e.down, after, indices, slot + kGroup);
    typename V::F sums[kGroup];
    for (auto& s : sums) s = V::set(0.0f);
    for (size_t c = 0; c < e.d; c += 16) {
      const auto v = load_some<V>(x + c, e.d - c);
      next.fetch(c);
      for (size_t r = 0; r < kGroup; ++r) sums[r] = V::madd(v, load_some<V>(group.row[r] + c, e.d - c), sums[r]);
    }
    for (size_t r = 0; r < kGroup && slot + r < e.k; ++r) hidden[slot + r] = sum<V>(sums[r]);
  }
}

/// y = sum_s coefficient_s up_s, in the order of s.
template <class V, class T>
void expert_sum(const ProductKeyExperts& e, const int64_t* indices, const float* hidden, const float* weights,
                const int64_t* next_indices, float* y) {
  constexpr size_t kGroup = ExpertGroup<V, T>::kSize;
  const void* after = e.down ? e.down : e.up;
  std::memset(y, 0, e.d * sizeof(float));
  auto next = group_at<V, T>(e, e.up, after, indices, 0);
  for (size_t slot = 0; slot < e.k; slot += kGroup) {
    const auto group = next;
    next = slot + kGroup < e.k ? group_at<V, T>(e, e.up, after, indices, slot + kGroup)
                               : ExpertGroup<V, T>(after, next_indices, e.k, e.d);
    const size_t count = e.k - slot < kGroup ? e.k - slot : kGroup;
    alignas(64) float coefficients[16] = {};
    std::memcpy(coefficients, weights + slot, count * sizeof(float));
    if (e.down) {
      const auto h = activate<V>(e.activation, load_some<V>(hidden + slot, count));
      V::store(coefficients, V::mul(h, V::load(coefficients)));
    }
    for (size_t c = 0; c < e.d; c += 16) {
      auto sums = load_some<V>(y + c, e.d - c);
      next.fetch(c);
      for (size_t r = 0; r < count; ++r) {
        sums = V::madd(V::set(coefficients[r]), load_some<V>(group.row[r] + c, e.d - c), sums);
      }
      store_some<V>(y + c, e.d - c, sums);
    }
  }
}

template <class V, class T>
void expert_rows_of(const ProductKeyExperts& e, size_t first, size_t end) {
  for (size_t t = first; t < end; ++t) {
    const int64_t* indices = e.indices + t * e.k;
    float* hidden = e.hidden ? e.hidden + t * e.k : nullptr;
    if (e.down) expert_dots<V, T>(e, e.x + t * e.d, indices, hidden);
    if (e.up) {
      const int64_t* next = t + 1 < end ? indices + e.k : indices;
      expert_sum<V, T>(e, indices, hidden, e.weights + t * e.k, next, e.y + t * e.d);
    }
  }
}

/// Rows first ... end - 1 of x.
template <class V>
void expert_rows(const ProductKeyExperts& e, size_t first, size_t end) {
  switch (e.dtype) {
    case THRIFTY_F32: return expert_rows_of<V, float>(e, first, end);
    case THRIFTY_BF16: return expert_rows_of<V, Bfloat>(e, first, end);
    default: return expert_rows_of<V, Half>(e, first, end);
  }
}

}  // namespace
}  // namespace thrifty
