#pragma once

#include "attention.hpp"

namespace thrifty {
namespace {

/// The longest heads whose keys and values are widened.
constexpr size_t kBlockHeadDim = 256;
/// Features of values that are widened at once: with all positions of a chunk they stay in the first cache.
constexpr size_t kBlockFeatures = 32;

/// Queries of several rows, in order, and what they have seen. Keys and values are widened to float32 once for all.
struct QueryBlock {
  size_t count = 0;
  const float* q[kBlockQueries];
  float* y[kBlockQueries];
  size_t length[kBlockQueries];
  Softmax total[kBlockQueries];
  Merge merges[kBlockQueries];
  alignas(64) float scores[kBlockQueries][kChunk];
  alignas(64) float keys[2 * kBlockHeadDim * 16];
  alignas(64) float values[kChunk * kBlockFeatures];

  /// Positions of a chunk that query i sees.
  size_t seen(size_t i, size_t start) const {
    return length[i] <= start ? 0 : length[i] - start < kChunk ? length[i] - start : kChunk;
  }

  /// The first query that sees anything of a chunk: all after it do.
  size_t first_seeing(size_t start) const {
    size_t first = 0;
    while (length[first] <= start) ++first;
    return first;
  }

  /// Takes a chunk's softmax into that of query i; `merges` are the factors of their values where there were any.
  template <class V>
  void add_part(size_t i, size_t start, const Softmax& part) {
    if (start == 0) {
      total[i] = part;
    } else {
      merges[i] = merge<V>(total[i], part);
    }
  }
};

/// Scores of all queries in the order of attention.hpp, two blocks of sixteen positions after another. Later queries
/// see more, so a run of them goes as far as its last.
template <class V, class T>
void score_chunk(QueryBlock& set, const T* k, size_t d, size_t start, size_t active) {
  for (size_t from = 0; from < set.seen(set.count - 1, start); from += 32, k += 32 * d) {
    for (size_t i = 0; i < 32 * d; i += 16) V::store(set.keys + i, V::load(k + i));
    in_runs<V::kBlocks == 1 ? 4 : 8>(set.count - active, [&](auto n, size_t first) {
      first += active;
      if (from >= set.seen(first + n() - 1, start)) return;
      constexpr int kAtOnce = V::kBlocks > 1 ? 2 : 1;
      for (size_t b = 0; b < 2; b += kAtOnce) {
        auto* out = reinterpret_cast<float (*)[kChunk]>(set.scores[first] + from + 16 * b);
        score_blocks<V, float, n(), kAtOnce, false>(set.q + first, set.keys + b * d * 16, nullptr, d, out);
      }
    });
  }
}

/// `mix` of attention.hpp for queries that see different numbers of positions: `common` of them are seen by all.
template <class V, int kCount, int kVectors>
void mix_block(const QueryBlock& set, size_t first, size_t start, const float* v, size_t feature, size_t d) {
  typename V::F acc[kCount][kVectors];
  for (auto& row : acc)
    for (auto& sums : row) sums = V::set(0.0f);
  const float (*p)[kChunk] = set.scores + first;
  const size_t common = set.seen(first, start), most = set.seen(first + kCount - 1, start);
  size_t s = 0;
  for (; s < common; ++s, v += kBlockFeatures) {
    typename V::F values[kVectors];
    for (int i = 0; i < kVectors; ++i) values[i] = V::load(v + 16 * i);
    for (int j = 0; j < kCount; ++j) {
      const auto weight = V::set(p[j][s]);
      for (int i = 0; i < kVectors; ++i) acc[j][i] = V::madd(weight, values[i], acc[j][i]);
    }
  }
  for (; s < most; ++s, v += kBlockFeatures) {
    for (int j = 0; j < kCount; ++j) {
      if (s >= set.seen(first + size_t(j), start)) continue;
      const auto weight = V::set(p[j][s]);
      for (int i = 0; i < kVectors; ++i) acc[j][i] = V::madd(weight, V::load(v + 16 * i), acc[j][i]);
    }
  }
  for (int j = 0; j < kCount; ++j) {
    for (int i = 0; i < kVectors; ++i) {
      const size_t at = feature + 16 * size_t(i);
      float* y = set.y[first + size_t(j)] + at;
      auto o = acc[j][i];
      if (start > 0) {
        const Merge& f = set.merges[first + size_t(j)];
        o = V::madd(o, V::set(f.added), V::mul(load_some<V>(y, d - at), V::set(f.kept)));
      }
      store_some<V>(y, d - at, o);
    }
  }
}

template <class V, class T>
void mix_chunk(QueryBlock& set, const T* v, size_t d, size_t start, size_t active) {
  const size_t stride = up_to(d, 16), most = set.seen(set.count - 1, start);
  for (size_t feature = 0; feature < stride; feature += kBlockFeatures) {
    const size_t width = stride - feature < kBlockFeatures ? stride - feature : kBlockFeatures;
    for (size_t s = 0; s < most; ++s) {
      for (size_t i = 0; i < width; i += 16) {
        V::store(set.values + s * kBlockFeatures + i, V::load(v + s * stride + feature + i));
      }
    }
    in_runs<V::kBlocks == 1 ? 4 : 8>(set.count - active, [&](auto n, size_t first) {
      first += active;
      constexpr int kAtOnce = V::kBlocks > 1 ? 2 : 1;
      if (width == 16 * kAtOnce) return mix_block<V, n(), kAtOnce>(set, first, start, set.values, feature, d);
      for (size_t i = 0; i < width; i += 16) {
        mix_block<V, n(), 1>(set, first, start, set.values + i, feature + i, d);
      }
    });
  }
}

template <class V, class T>
void attend_block(const Attention& a, const HeadCache& cache, QueryBlock& set) {
  const size_t d = a.shape.head_dim;
  for (size_t start = 0; start < set.length[set.count - 1]; start += kChunk) {
    const size_t active = set.first_seeing(start);
    score_chunk<V>(set, reinterpret_cast<const T*>(cache.k) + start * d, d, start, active);
    for (size_t i = active; i < set.count; ++i) {
      set.add_part<V>(i, start, weigh<V>(set.scores[i], set.seen(i, start), a.scale, cache.bias_from(start)));
    }
    mix_chunk<V>(set, reinterpret_cast<const T*>(cache.v) + start * up_to(d, 16), d, start, active);
  }
  for (size_t i = 0; i < set.count; ++i) divide<V>(set.y[i], d, set.total[i].l);
}

template <class V>
void attend_block(const Attention& a, const HeadCache& cache, QueryBlock& set) {
  if (a.shape.dtype == THRIFTY_F16) return attend_block<V, Half>(a, cache, set);
  attend_block<V, float>(a, cache, set);
}

/// Calls run(cache, block) for the queries of some rows, in blocks.
template <class Run>
void in_blocks(const Attention& a, size_t row, size_t rows, size_t kv_head, const Run& run) {
  const Heads& h = a.shape;
  const HeadCache cache(h, a.batch->caches[a.batch->slots[row]], kv_head);
  QueryBlock set;
  for (size_t r = row; r < row + rows; ++r) {
    for (size_t head = kv_head * group_of(h); head < (kv_head + 1) * group_of(h); ++head) {
      set.q[set.count] = a.q + r * a.q_stride + head * h.head_dim;
      set.y[set.count] = a.y + r * a.y_stride + head * h.head_dim;
      set.length[set.count] = size_t(a.batch->positions[r]) + 1;
      if (++set.count == kBlockQueries) {
        run(cache, set);
        set.count = 0;
      }
    }
  }
  if (set.count > 0) run(cache, set);
}

/// `attend_rows` with the same bits: many queries in blocks, where there is anything to widen.
template <class V>
void attend_many(const Attention& a, size_t row, size_t rows, size_t kv_head) {
  const Heads& h = a.shape;
  const bool few = rows * group_of(h) <= kQueries || h.head_dim > kBlockHeadDim;
  if (few || h.dtype == THRIFTY_INT8) return attend_rows<V>(a, row, rows, kv_head);
  in_blocks(a, row, rows, kv_head, [&](const HeadCache& cache, QueryBlock& set) { attend_block<V>(a, cache, set); });
}

}  // namespace
}  // namespace thrifty
