#pragma once

#include <type_traits>

#include "../attention/attention.hpp"
#include "../rope_cache/rope_cache.hpp"

namespace thrifty {
namespace {

/// The keys that one score head of a sequence keeps. While there is room a key's slot is its position; then a better
/// key takes the slot of the worst.
class KeptKeys {
 public:
  KeptKeys(const DynamicMask& m, const thrifty_slot& sequence, size_t head)
      : most_(m.window > 0 && m.window < size_t(sequence.capacity) ? m.window : size_t(sequence.capacity)),
        slots_(up_to(most_, THRIFTY_CACHE_BLOCK)),
        layer_(layer_of(m, sequence)),
        cache(heads_of(m), {layer_, int64_t(slots_), nullptr}, head) {
    const size_t all = m.shape.kv_heads * slots_;
    float* scores = reinterpret_cast<float*>(layer_ + HeadCache::layer_bytes(heads_of(m), slots_));
    ages_ = reinterpret_cast<int32_t*>(scores + all) + head * slots_;
    scores_ = scores + head * slots_;
    cache.bias = scores_;
  }

  bool has_room(size_t position) const { return position < most_; }
  /// Keys kept once that of `position` has come.
  size_t count(size_t position) const { return has_room(position) ? position + 1 : most_; }

  template <class V, class T>
  void keep(size_t d, size_t position, float score, const float* k, const float* v) {
    size_t slot = position;
    if (!has_room(position)) {
      slot = worst();
      if (score < scores_[slot]) return;
    }
    scores_[slot] = score;
    ages_[slot] = int32_t(position);
    if constexpr (std::is_same_v<T, int8_t>) {
      keep_int8<V>(cache, d, slot, k, v);
    } else {
      thrifty::keep<V, T>(cache, d, slot, k, v);
    }
  }

 private:
  static Heads heads_of(const DynamicMask& m) {
    Heads h = m.shape;
    h.layer = 0;
    return h;
  }
  char* layer_of(const DynamicMask& m, const thrifty_slot& sequence) const {
    const size_t bytes = HeadCache::layer_bytes(heads_of(m), slots_) + 8 * m.shape.kv_heads * slots_;
    return static_cast<char*>(sequence.states) + m.at + m.shape.layer * bytes;
  }

  /// The oldest of those that score least.
  size_t worst() const {
    size_t found = 0;
    for (size_t i = 1; i < most_; ++i) {
      if (scores_[i] < scores_[found] || (scores_[i] == scores_[found] && ages_[i] < ages_[found])) found = i;
    }
    return found;
  }

  size_t most_, slots_;
  char* layer_;
  float* scores_;
  int32_t* ages_;

 public:
  HeadCache cache;
};

template <class V>
void keep_row(const DynamicMask& m, KeptKeys& kept, size_t row, size_t head) {
  const size_t d = m.shape.head_dim, kv_head = head / (m.shape.kv_heads / m.kv_heads);
  const float *k = m.k + row * m.stride + kv_head * d, *v = m.v + row * m.stride + kv_head * d;
  const size_t position = size_t(m.batch->positions[row]);
  const float score = m.scores[row * m.shape.kv_heads + head];
  if (m.shape.dtype == THRIFTY_INT8) return kept.keep<V, int8_t>(d, position, score, k, v);
  if (m.shape.dtype == THRIFTY_F16) return kept.keep<V, Half>(d, position, score, k, v);
  kept.keep<V, float>(d, position, score, k, v);
}

/// Rows in order: a key is kept before its query looks. Rows between which no key is lost are held against the keys
/// together.
template <class V>
void dynamic_mask_rows(const DynamicMask& m, size_t first, size_t end, size_t head) {
  const size_t d = m.shape.head_dim, group = group_of(m.shape), most = group < kQueries ? kQueries / group : 1;
  KeptKeys kept(m, m.batch->caches[m.batch->slots[first]], head);
  const Attention a{m.shape, m.batch, m.q, m.stride, m.y, m.shape.heads * d, m.scale, nullptr, 0};
  if (!m.q) {
    for (size_t row = first; row < end; ++row) keep_row<V>(m, kept, row, head);
    return;
  }
  for (size_t row = first, stop; row < end; row = stop) {
    stop = row;
    do {
      keep_row<V>(m, kept, stop++, head);
    } while (stop < end && stop - row < most && kept.has_room(size_t(m.batch->positions[stop])));
    Queries set;
    for (size_t r = row; r < stop; ++r) {
      for (size_t q = head * group; q < (head + 1) * group; ++q) {
        set.add(a.q + r * a.q_stride + q * d, a.y + r * a.y_stride + q * d, kept.count(size_t(m.batch->positions[r])));
        if (set.count == kQueries) attend_set<V>(a, kept.cache, set);
      }
    }
    if (set.count > 0) attend_set<V>(a, kept.cache, set);
  }
}

}  // namespace
}  // namespace thrifty
