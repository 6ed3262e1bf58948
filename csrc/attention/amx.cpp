#include "../amx.hpp"

#include "../vector/avx512.hpp"
#include "blocks.hpp"

namespace thrifty {
namespace {

/// Queries that fill a tile register, and bytes of one of its rows.
constexpr size_t kTokens = 16;
constexpr size_t kStep = 64;
static_assert(kBlockQueries == 2 * kTokens, "a block is two registers");

using Codes = CodedQueries<Avx512, kBlockQueries, kBlockHeadDim>;
using Weights = CodedWeights<Avx512>;

/// `take_int8_chunk` for a block of queries, in the tile unit. The cache is one of its operands as it lies: keys of
/// sixteen positions, four features a row; values of 64 positions, four a row, sixteen features of them.
class Int8Block {
 public:
  Int8Block(const Attention& a, const HeadCache& cache, QueryBlock& set)
      : cache_(cache), set_(set), d_(a.shape.head_dim), codes_(set.q, set.count, d_, a.scale) {
    for (size_t i = 0; i < set.count; ++i) _mm512_store_si512(minus_[i], _mm512_set1_epi32(-codes_.offset[i]));
    publish(minus_);
    publish(codes_.codes);
  }

  void run() {
    for (size_t start = 0; start < set_.length[set_.count - 1]; start += kChunk) {
      first_ = set_.first_seeing(start);
      score(start);
      weigh(start);
      mix(start);
    }
    for (size_t i = 0; i < set_.count; ++i) divide<Avx512>(set_.y[i], d_, set_.total[i].l);
  }

 private:
  size_t most(size_t start) const { return set_.seen(set_.count - 1, start); }

  /// Exact products, in the place of the scores.
  void score(size_t start) {
    const uint8_t* k = reinterpret_cast<const uint8_t*>(cache_.k) + start * d_;
    for (size_t from = 0; from < most(start); from += 32, k += 32 * d_) {
      _tile_loadd(0, minus_[0], kStep);
      _tile_loadd(1, minus_[kTokens], kStep);
      _tile_loadd(2, minus_[0], kStep);
      _tile_loadd(3, minus_[kTokens], kStep);
      for (size_t i = 0; i < d_; i += kStep) {
        _tile_loadd(4, codes_.codes[0] + i, sizeof codes_.codes[0]);
        _tile_loadd(6, k + i * 16, kStep);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(5, codes_.codes[kTokens] + i, sizeof codes_.codes[0]);
        _tile_dpbsud(1, 5, 6);
        _tile_loadd(7, k + (i + d_) * 16, kStep);
        _tile_dpbsud(2, 4, 7);
        _tile_dpbsud(3, 5, 7);
      }
      _tile_stored(0, set_.scores[0] + from, sizeof set_.scores[0]);
      _tile_stored(1, set_.scores[kTokens] + from, sizeof set_.scores[0]);
      _tile_stored(2, set_.scores[0] + from + 16, sizeof set_.scores[0]);
      _tile_stored(3, set_.scores[kTokens] + from + 16, sizeof set_.scores[0]);
    }
    publish(set_.scores);
  }

  void weigh(size_t start) {
    const size_t wide = up_to(most(start), kStep);
    for (size_t i = first_, end; i < set_.count; i = end) {
      end = i + 1;
      while (end < set_.count && end < i + kQueries && set_.length[end] == set_.length[i]) ++end;
      const size_t count = set_.seen(i, start), written = up_to(count, 16);
      Softmax parts[kQueries];
      Ahead none(set_.scores, 0);
      weigh_int8<Avx512, int32_t>(set_.scores + i, end - i, count, codes_.scale + i, cache_.k_scales + start,
                                  cache_.v_scales + start, nullptr, none, weights_ + i, parts);
      for (size_t j = i; j < end; ++j) {
        for (auto& codes : weights_[j].codes) std::memset(codes + written, 0, wide - written);
        set_.add_part<Avx512>(j, start, parts[j - i]);
      }
    }
    publish(weights_);
  }

  void mix(size_t start) {
    const size_t stride = 4 * d_;
    for (size_t feature = 0; feature < d_; feature += 16) {
      const uint8_t* v = reinterpret_cast<const uint8_t*>(cache_.v) + start * d_ + 4 * feature;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (size_t s = 0; s < most(start); s += kStep, v += kStep / 4 * stride) {
        _tile_loadd(6, v, stride);
        _tile_loadd(4, weights_[0].codes[0] + s, sizeof(Weights));
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(5, weights_[kTokens].codes[0] + s, sizeof(Weights));
        _tile_dpbsud(1, 5, 6);
        _tile_loadd(4, weights_[0].codes[1] + s, sizeof(Weights));
        _tile_dpbsud(2, 4, 6);
        _tile_loadd(5, weights_[kTokens].codes[1] + s, sizeof(Weights));
        _tile_dpbsud(3, 5, 6);
      }
      _tile_stored(0, high_[0] + feature, sizeof high_[0]);
      _tile_stored(1, high_[kTokens] + feature, sizeof high_[0]);
      _tile_stored(2, low_[0] + feature, sizeof high_[0]);
      _tile_stored(3, low_[kTokens] + feature, sizeof high_[0]);
    }
    publish(high_);
    publish(low_);
    for (size_t i = first_; i < set_.count; ++i) {
      const auto unit = Avx512::set(weights_[i].unit), kept = Avx512::set(set_.merges[i].kept);
      const auto added = Avx512::set(set_.merges[i].added);
      for (size_t at = 0; at < d_; at += 16) {
        const __m512i sums = Avx512::join(_mm512_load_si512(high_[i] + at), _mm512_load_si512(low_[i] + at));
        auto o = Avx512::mul(Avx512::floats(sums, weights_[i].offset), unit);
        float* y = set_.y[i] + at;
        if (start > 0) o = Avx512::madd(o, added, Avx512::mul(Avx512::load(y), kept));
        Avx512::store(y, o);
      }
    }
  }

  const HeadCache& cache_;
  QueryBlock& set_;
  const size_t d_;
  const Codes codes_;
  size_t first_ = 0;  // query that sees anything of the chunk
  Weights weights_[kBlockQueries];
  alignas(64) int32_t minus_[kBlockQueries][16];  // what the keys' 128 added to a product
  alignas(64) int32_t high_[kBlockQueries][kBlockHeadDim];
  alignas(64) int32_t low_[kBlockQueries][kBlockHeadDim];
};

}  // namespace

namespace amx {

void attend(const Attention& a, size_t row, size_t rows, size_t kv_head) {
  const Heads& h = a.shape;
  const bool tiles = h.dtype == THRIFTY_INT8 && h.head_dim % kStep == 0 && h.head_dim <= kBlockHeadDim;
  if (!tiles || rows * group_of(h) <= kQueries) return avx512::attend(a, row, rows, kv_head);
  _tile_loadconfig(&kTileConfigs.rows[kTokens]);
  in_blocks(a, row, rows, kv_head, [&](const HeadCache& cache, QueryBlock& set) { Int8Block(a, cache, set).run(); });
  _tile_release();
}

}  // namespace amx
}  // namespace thrifty
