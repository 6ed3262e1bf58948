#pragma once

#include "../prefetch.hpp"
#include "../step/cache.hpp"
#include "../unroll.hpp"
#include "../vector/math.hpp"
#include "softmax.hpp"

namespace thrifty {
namespace {

/// Memory that is wanted soon: a line of it is asked for at every turn of the arithmetic, so that the two take their
/// time together.
class Ahead {
 public:
  Ahead(const void* from, size_t bytes)
      : at_(static_cast<const char*>(from)), last_(at_ + (bytes < 64 ? 0 : bytes - 64)) {}

  void step() {
    prefetch_far(at_ < last_ ? at_ : last_);
    at_ += 64;
  }

 private:
  const char* at_;
  const char* last_;
};

/// Queries quantised as keys are: q = code * scale.
template <class V, size_t kMost = kQueries, size_t kMostDim = kMostInt8Dim>
struct CodedQueries {
  alignas(64) typename V::Code codes[kMost][kMostDim];
  float scale[kMost];     // times that of the scores
  int32_t offset[kMost];  // what the keys' 128 adds to every product

  CodedQueries(const float* const* q, size_t count, size_t d, float scores) {
    for (size_t j = 0; j < count; ++j) {
      const float factor = inverse_scale<V>(q[j], d, scale + j);
      auto sum = V::set(0.0f);
      for (size_t i = 0; i < d; i += 16) {
        auto code = V::round(V::mul(load_some<V>(q[j] + i, d - i), V::set(factor)));
        // A NaN is in the scale already.
        code = V::max(code, V::set(-127.0f));
        code = V::first(d - i, code, V::set(0.0f));
        V::store_codes(codes[j] + i, code);
        sum = V::add(sum, code);
      }
      offset[j] = 128 * int32_t(thrifty::sum<V>(sum));
      scale[j] *= scores;
    }
  }
};

/// scores[i][s] = the exact product of the codes of q_i and k_s, for the sixteen positions of kBlocks blocks.
template <class V, int kCount, int kBlocks>
void score_bytes(const CodedQueries<V>& q, size_t first, const uint8_t* k, size_t quads, Ahead& ahead,
                 float (*scores)[kChunk]) {
  typename V::Sums acc[kCount][kBlocks];
  for (auto& row : acc)
    for (auto& sums : row) sums = V::no_sums();
  Ahead lines = ahead;
  THRIFTY_UNROLL
  for (size_t c = 0; c < quads; ++c) {
    typename V::Bytes keys[kBlocks];
    for (int b = 0; b < kBlocks; ++b) {
      lines.step();
      keys[b] = V::load_bytes(k + (size_t(b) * quads + c) * 64);
    }
    for (int j = 0; j < kCount; ++j) {
      for (int b = 0; b < kBlocks; ++b) acc[j][b] = V::dot(acc[j][b], keys[b], q.codes[first + size_t(j)] + 4 * c);
    }
  }
  ahead = lines;
  for (int j = 0; j < kCount; ++j) {
    for (int b = 0; b < kBlocks; ++b) {
      V::store(scores[j] + 16 * b, V::floats(acc[j][b], q.offset[first + size_t(j)]));
    }
  }
}

template <class V, int kCount>
void score_int8(const CodedQueries<V>& q, size_t first, const uint8_t* k, size_t quads, size_t blocks, Ahead& ahead,
                float (*scores)[kChunk]) {
  constexpr int kMost = V::kBlocks > 1 ? (kCount > 4 ? 2 : 4) : 1;
  const auto out = [&](size_t b) { return reinterpret_cast<float (*)[kChunk]>(scores[0] + 16 * b); };
  size_t b = 0;
  for (; b + kMost <= blocks; b += kMost)
    score_bytes<V, kCount, kMost>(q, first, k + b * quads * 64, quads, ahead, out(b));
  for (; b < blocks; ++b) score_bytes<V, kCount, 1>(q, first, k + b * quads * 64, quads, ahead, out(b));
}

/// exp(score - m) * v_scale as a whole number of `unit`s.
template <class V>
struct CodedWeights {
  alignas(64) typename V::Code codes[V::kWeightParts][kChunk];
  float unit;
  int32_t offset;
};

/// Scores of some queries that see the same positions to weights of whole numbers, those of positions from `count` on
/// 0. They come as floats or, in the same place, as exact products (T). Each stage goes over all of them before the
/// next: what a stage waits for, the largest of a row, takes longer than the rest.
template <class V, class T = float>
void weigh_int8(float (*s)[kChunk], size_t queries, size_t count, const float* scale, const float* k_scales,
                const float* v_scales, const float* bias, Ahead& ahead, CodedWeights<V>* w, Softmax* parts) {
  const auto none = V::set(-INFINITY), zero = V::set(0.0f);
  Ahead lines = ahead;
  typename V::F most[kQueries], l[kQueries];
  // Only the last sixteen positions may be cut.
  const auto each = [&](const auto& take) {
    size_t at = 0;
    for (; at + 16 <= count; at += 16) take(at, [](auto v, auto) { return v; });
    if (at < count) take(at, [&](auto v, auto other) { return V::first(count - at, v, other); });
  };
  for (size_t j = 0; j < queries; ++j) {
    most[j] = none;
    each([&](size_t at, const auto& cut) {
      auto v = V::mul(V::mul(V::load(reinterpret_cast<const T*>(s[j] + at)), V::set(scale[j])), V::load(k_scales + at));
      if (bias) v = V::add(v, V::load(bias + at));
      v = cut(v, none);
      V::store(s[j] + at, v);
      most[j] = V::max(most[j], v);
    });
  }
  for (size_t j = 0; j < queries; ++j) parts[j].m = largest<V>(most[j]);
  for (size_t j = 0; j < queries; ++j) {
    l[j] = most[j] = zero;
    each([&](size_t at, const auto& cut) {
      lines.step();
      const auto p = cut(exp_negative<V>(V::sub(V::load(s[j] + at), V::set(parts[j].m))), zero);
      const auto weight = cut(V::mul(p, V::load(v_scales + at)), zero);
      l[j] = V::add(l[j], p);
      most[j] = V::max(most[j], weight);
      V::store(s[j] + at, weight);
    });
  }
  for (size_t j = 0; j < queries; ++j) {
    parts[j].l = sum<V>(l[j]);
    w[j].unit = largest<V>(most[j]) / float(kMostWeight);
  }
  for (size_t j = 0; j < queries; ++j) {
    const auto factor = V::set(1.0f / w[j].unit);
    auto codes = zero;
    for (size_t at = 0; at < count; at += 16) {
      lines.step();
      const auto code = V::max(V::round(V::mul(V::load(s[j] + at), factor)), zero);
      V::store_weights(w[j].codes[0] + at, kChunk, code);
      codes = V::add(codes, code);
    }
    l[j] = codes;
  }
  for (size_t j = 0; j < queries; ++j) w[j].offset = 128 * int32_t(sum<V>(l[j]));
  ahead = lines;
}

/// o_i = unit_i * the exact sum of codes of weights and values, for kVectors * 16 features; merged as `mix` does.
template <class V, int kCount, int kVectors>
void mix_bytes(const CodedWeights<V>* w, const uint8_t* v, size_t stride, size_t quads, Ahead& ahead, float* const* y,
               size_t from, size_t d, const Merge* merges) {
  typename V::Sums acc[V::kWeightParts][kCount][kVectors];
  for (auto& part : acc)
    for (auto& row : part)
      for (auto& sums : row) sums = V::no_sums();
  Ahead lines = ahead;
  THRIFTY_UNROLL
  for (size_t c = 0; c < quads; ++c, v += 4 * stride) {
    typename V::Bytes values[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      lines.step();
      values[i] = V::load_bytes(v + (from + 16 * size_t(i)) * 4);
    }
    for (int part = 0; part < V::kWeightParts; ++part) {
      for (int j = 0; j < kCount; ++j) {
        for (int i = 0; i < kVectors; ++i) {
          acc[part][j][i] = V::dot(acc[part][j][i], values[i], w[j].codes[part] + 4 * c);
        }
      }
    }
  }
  ahead = lines;
  for (int j = 0; j < kCount; ++j) {
    for (int i = 0; i < kVectors; ++i) {
      const size_t at = from + 16 * size_t(i);
      const auto sums = V::kWeightParts == 1 ? acc[0][j][i] : V::join(acc[0][j][i], acc[V::kWeightParts - 1][j][i]);
      auto o = V::mul(V::floats(sums, w[j].offset), V::set(w[j].unit));
      if (merges) {
        const auto before = V::mul(load_some<V>(y[j] + at, d - at), V::set(merges[j].kept));
        o = V::madd(o, V::set(merges[j].added), before);
      }
      store_some<V>(y[j] + at, d - at, o);
    }
  }
}

template <class V, int kCount>
void mix_int8(const CodedWeights<V>* w, const uint8_t* v, size_t d, size_t quads, Ahead& ahead, float* const* y,
              const Merge* merges) {
  constexpr int kMost = V::kBlocks == 1 ? 1 : kCount > 2 ? 2 : 4;
  const size_t stride = up_to(d, 16);
  size_t i = 0;
  for (; i + 16 * kMost <= stride; i += 16 * kMost) {
    mix_bytes<V, kCount, kMost>(w, v, stride, quads, ahead, y, i, d, merges);
  }
  for (; i < stride; i += 16) mix_bytes<V, kCount, 1>(w, v, stride, quads, ahead, y, i, d, merges);
}

/// `take_chunk` over int8: spec.attention_int8.
template <class V>
void take_int8_chunk(const Attention& a, const HeadCache& cache, size_t chunk, const CodedQueries<V>& q, Queries& set) {
  const size_t d = a.shape.head_dim, start = chunk * kChunk, key = up_to(d, 4), value = up_to(d, 16);
  const size_t longest = longest_of(set), most = longest - start < kChunk ? longest - start : kChunk;
  const auto* k = reinterpret_cast<const uint8_t*>(cache.k) + start * key;
  const auto* v = reinterpret_cast<const uint8_t*>(cache.v) + start * value;
  const size_t after = longest - start - most < kChunk ? longest - start - most : kChunk;
  Ahead values(v, most * value), keys(k + kChunk * key, after * key);
  alignas(64) float scores[kQueries][kChunk];
  in_runs<V::kBlocks == 1 ? 2 : 8>(set.count, [&](auto n, size_t first) {
    score_int8<V, n()>(q, first, k, key / 4, up_to(most, 16) / 16, values, scores + first);
  });
  Merge merges[kQueries];
  for (size_t first = 0, end; first < set.count; first = end) {
    end = same_length(set, first);
    if (set.length[first] <= start) continue;
    const size_t count = set.length[first] - start < kChunk ? set.length[first] - start : kChunk;
    CodedWeights<V> weights[kQueries];
    Softmax parts[kQueries];
    const bool begun = set.begun[first];
    weigh_int8<V>(scores + first, end - first, count, q.scale + first, cache.k_scales + start, cache.v_scales + start,
                  cache.bias_from(start), keys, weights + first, parts + first);
    for (size_t i = first; i < end; ++i) merges[i] = add_part<V>(set, i, parts[i]);
    in_runs<V::kBlocks == 1 ? 2 : 4>(end - first, [&](auto n, size_t at) {
      at += first;
      mix_int8<V, n()>(weights + at, v, d, up_to(count, 4) / 4, keys, set.y + at, begun ? merges + at : nullptr);
    });
  }
}

}  // namespace
}  // namespace thrifty
