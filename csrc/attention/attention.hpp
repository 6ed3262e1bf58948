#pragma once

#include "../prefetch.hpp"
#include "../step/cache.hpp"
#include "../vector/math.hpp"
#include "int8.hpp"
#include "softmax.hpp"

namespace thrifty {
namespace {

/// scores[i][s] = q_i . k_s over the sixteen positions of kBlocks blocks; every sum runs over d in order. While keys
/// are scored, as many bytes at `ahead` are fetched: the values of the chunk, and while those are mixed, the next keys.
template <class V, class T, int kCount, int kBlocks, bool kFetch = true>
void score_blocks(const float* const* q, const T* k, const T* ahead, size_t d, float (*scores)[kChunk]) {
  typename V::F acc[kCount][kBlocks];
  for (auto& row : acc)
    for (auto& sums : row) sums = V::set(0.0f);
  for (size_t i = 0; i < d; ++i) {
    typename V::F keys[kBlocks];
    for (int b = 0; b < kBlocks; ++b) {
      const size_t at = (size_t(b) * d + i) * 16;
      if (kFetch && i % (64 / sizeof(T) / 16) == 0) prefetch_far(ahead + at);
      keys[b] = V::load(k + at);
    }
    for (int j = 0; j < kCount; ++j) {
      const auto x = V::set(q[j][i]);
      for (int b = 0; b < kBlocks; ++b) acc[j][b] = V::madd(keys[b], x, acc[j][b]);
    }
  }
  for (int j = 0; j < kCount; ++j)
    for (int b = 0; b < kBlocks; ++b) V::store(scores[j] + 16 * b, acc[j][b]);
}

template <class V, class T, int kCount>
void score_queries(const float* const* q, const T* k, const T* ahead, size_t d, size_t blocks,
                   float (*scores)[kChunk]) {
  constexpr int kMost = V::kBlocks > 1 ? (kCount > 4 ? 2 : 4) : 1;
  size_t b = 0;
  for (; b + kMost <= blocks; b += kMost) {
    auto* out = reinterpret_cast<float (*)[kChunk]>(scores[0] + 16 * b);
    score_blocks<V, T, kCount, kMost>(q, k + b * d * 16, ahead + b * d * 16, d, out);
  }
  for (; b < blocks; ++b) {
    auto* out = reinterpret_cast<float (*)[kChunk]>(scores[0] + 16 * b);
    score_blocks<V, T, kCount, 1>(q, k + b * d * 16, ahead + b * d * 16, d, out);
  }
}

/// Scores to weights exp(score - m) in place, those of positions from `count` on 0.
template <class V>
Softmax weigh(float* s, size_t count, float scale, const float* bias) {
  const size_t blocks = up_to(count, 16) / 16;
  const auto none = V::set(-INFINITY);
  auto most = none;
  for (size_t b = 0; b < blocks; ++b) {
    auto v = V::mul(V::load(s + 16 * b), V::set(scale));
    if (bias) v = V::add(v, V::load(bias + 16 * b));
    v = V::first(count - 16 * b, v, none);
    V::store(s + 16 * b, v);
    most = V::max(most, v);
  }
  const float m = largest<V>(most);
  auto l = V::set(0.0f);
  for (size_t b = 0; b < blocks; ++b) {
    auto p = exp_negative<V>(V::sub(V::load(s + 16 * b), V::set(m)));
    p = V::first(count - 16 * b, p, V::set(0.0f));
    l = V::add(l, p);
    V::store(s + 16 * b, p);
  }
  return {m, sum<V>(l)};
}

/// o_i = sum of p_i[s] v_s in order of s, for kVectors * 16 features; then y_i = y_i * kept + o_i * added, or o_i.
template <class V, class T, int kCount, int kVectors>
void mix(const float (*p)[kChunk], const T* v, const T* ahead, size_t stride, size_t count, float* const* y,
         size_t left, const Merge* merges) {
  typename V::F acc[kCount][kVectors];
  for (auto& row : acc)
    for (auto& sums : row) sums = V::set(0.0f);
  for (size_t s = 0; s < count; ++s, v += stride, ahead += stride) {
    typename V::F values[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      if (i % (64 / sizeof(T) / 16) == 0) prefetch_far(ahead + 16 * i);
      values[i] = V::load(v + 16 * i);
    }
    for (int j = 0; j < kCount; ++j) {
      const auto weight = V::set(p[j][s]);
      for (int i = 0; i < kVectors; ++i) acc[j][i] = V::madd(weight, values[i], acc[j][i]);
    }
  }
  for (int j = 0; j < kCount; ++j) {
    for (int i = 0; i < kVectors; ++i) {
      const size_t at = size_t(i) * 16;
      auto o = acc[j][i];
      if (merges) {
        const auto before = V::mul(load_some<V>(y[j] + at, left - at), V::set(merges[j].kept));
        o = V::madd(o, V::set(merges[j].added), before);
      }
      store_some<V>(y[j] + at, left - at, o);
    }
  }
}

template <class V, class T, int kCount>
void mix_queries(const float (*p)[kChunk], const T* v, const T* ahead, size_t d, size_t count, float* const* y,
                 const Merge* merges) {
  constexpr int kMost = kCount > 2 ? 4 : 8;
  const size_t stride = up_to(d, 16);
  size_t i = 0;
  float* at[kCount];
  for (; i + 16 * kMost <= stride; i += 16 * kMost) {
    for (int j = 0; j < kCount; ++j) at[j] = y[j] + i;
    mix<V, T, kCount, kMost>(p, v + i, ahead + i, stride, count, at, d - i, merges);
  }
  for (; i < stride; i += 16) {
    for (int j = 0; j < kCount; ++j) at[j] = y[j] + i;
    mix<V, T, kCount, 1>(p, v + i, ahead + i, stride, count, at, d - i, merges);
  }
}

/// One chunk of one kv head for some queries: y and total of each take it in.
template <class V, class T>
void take_chunk(const Attention& a, const HeadCache& cache, size_t chunk, Queries& set) {
  const size_t d = a.shape.head_dim, start = chunk * kChunk;
  const size_t longest = longest_of(set), most = longest - start < kChunk ? longest - start : kChunk;
  alignas(64) float scores[kQueries][kChunk];
  const T* k = reinterpret_cast<const T*>(cache.k) + start * d;
  const T* v = reinterpret_cast<const T*>(cache.v) + start * up_to(d, 16);
  in_runs<V::kBlocks == 1 ? 4 : 8>(set.count, [&](auto n, size_t first) {
    score_queries<V, T, n()>(set.q + first, k, v, d, up_to(most, 16) / 16, scores + first);
  });
  Merge merges[kQueries];
  for (size_t first = 0, end; first < set.count; first = end) {
    end = same_length(set, first);
    if (set.length[first] <= start) continue;
    const size_t count = set.length[first] - start < kChunk ? set.length[first] - start : kChunk;
    const bool begun = set.begun[first];
    for (size_t i = first; i < end; ++i) {
      merges[i] = add_part<V>(set, i, weigh<V>(scores[i], count, a.scale, cache.bias_from(start)));
    }
    in_runs<4>(end - first, [&](auto n, size_t at) {
      at += first;
      mix_queries<V, T, n()>(scores + at, v, k + kChunk * d, d, count, set.y + at, begun ? merges + at : nullptr);
    });
  }
}

/// Calls before(chunk), takes the chunk and calls after(chunk), for chunks `first` ... end - 1.
template <class V, class Before, class After>
void take_chunks(const Attention& a, const HeadCache& cache, size_t first, size_t end, Queries& set,
                 const Before& before, const After& after) {
  const auto each = [&](const auto& take) {
    for (size_t chunk = first; chunk < end; ++chunk) {
      before(chunk);
      take(chunk);
      after(chunk);
    }
  };
  if (a.shape.dtype == THRIFTY_INT8) {
    const CodedQueries<V> codes(set.q, set.count, a.shape.head_dim, a.scale);
    each([&](size_t chunk) { take_int8_chunk<V>(a, cache, chunk, codes, set); });
  } else if (a.shape.dtype == THRIFTY_F16) {
    each([&](size_t chunk) { take_chunk<V, Half>(a, cache, chunk, set); });
  } else {
    each([&](size_t chunk) { take_chunk<V, float>(a, cache, chunk, set); });
  }
}

/// y = o / l.
template <class V>
void divide(float* y, size_t d, float l) {
  for (size_t i = 0; i < d; i += 16) {
    store_some<V>(y + i, d - i, V::div(load_some<V>(y + i, d - i), V::set(l)));
  }
}

template <class V>
void attend_set(const Attention& a, const HeadCache& cache, Queries& set) {
  const auto nothing = [](size_t) {};
  take_chunks<V>(a, cache, 0, up_to(longest_of(set), kChunk) / kChunk, set, nothing, nothing);
  for (size_t i = 0; i < set.count; ++i) divide<V>(set.y[i], a.shape.head_dim, set.total[i].l);
  set.count = 0;
}

template <class V>
void attend_rows(const Attention& a, size_t row, size_t rows, size_t kv_head) {
  const Heads& h = a.shape;
  const HeadCache cache(h, a.batch->caches[a.batch->slots[row]], kv_head);
  Queries set;
  for (size_t r = row; r < row + rows; ++r) {
    for (size_t head = kv_head * group_of(h); head < (kv_head + 1) * group_of(h); ++head) {
      set.add(a.q + r * a.q_stride + head * h.head_dim, a.y + r * a.y_stride + head * h.head_dim,
              size_t(a.batch->positions[r]) + 1);
      if (set.count == kQueries) attend_set<V>(a, cache, set);
    }
  }
  if (set.count > 0) attend_set<V>(a, cache, set);
}

/// Where a head's part of a chunk waits for its merge: m and l, then o.
inline float* part_of(const Attention& a, size_t row, size_t head, size_t chunk) {
  const size_t index = (row * a.shape.heads + head) * a.most_chunks + chunk;
  return a.scratch + index * (up_to(a.shape.head_dim, 16) + 16);
}

template <class V>
void attend_parts(const Attention& a, size_t row, size_t kv_head, size_t first_chunk, size_t end_chunk) {
  const Heads& h = a.shape;
  const HeadCache cache(h, a.batch->caches[a.batch->slots[row]], kv_head);
  const size_t length = size_t(a.batch->positions[row]) + 1, end = (kv_head + 1) * group_of(h);
  for (size_t head = kv_head * group_of(h), first = head; head < end; first = head) {
    Queries set;
    for (; head < end && set.count < kQueries; ++head) {
      set.add(a.q + row * a.q_stride + head * h.head_dim, nullptr, length);
    }
    const auto before = [&](size_t chunk) {
      for (size_t i = 0; i < set.count; ++i) {
        set.y[i] = part_of(a, row, first + i, chunk) + 16;
        set.begun[i] = false;
      }
    };
    take_chunks<V>(a, cache, first_chunk, end_chunk, set, before, [&](size_t chunk) {
      for (size_t i = 0; i < set.count; ++i) {
        float* part = part_of(a, row, first + i, chunk);
        part[0] = set.total[i].m;
        part[1] = set.total[i].l;
      }
    });
  }
}

template <class V>
void merge_parts(const Attention& a, size_t row, size_t kv_head) {
  const Heads& h = a.shape;
  const size_t d = h.head_dim, chunks = (size_t(a.batch->positions[row]) + kChunk) / kChunk;
  for (size_t head = kv_head * group_of(h); head < (kv_head + 1) * group_of(h); ++head) {
    float* y = a.y + row * a.y_stride + head * d;
    const float* part = part_of(a, row, head, 0);
    Softmax total{part[0], part[1]};
    std::memcpy(y, part + 16, d * 4);
    for (size_t chunk = 1; chunk < chunks; ++chunk) {
      part = part_of(a, row, head, chunk);
      const Merge f = merge<V>(total, {part[0], part[1]});
      for (size_t i = 0; i < d; i += 16) {
        const auto before = V::mul(load_some<V>(y + i, d - i), V::set(f.kept));
        store_some<V>(y + i, d - i, V::madd(load_some<V>(part + 16 + i, d - i), V::set(f.added), before));
      }
    }
    divide<V>(y, d, total.l);
  }
}

}  // namespace
}  // namespace thrifty
