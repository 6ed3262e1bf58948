#include "../amx.hpp"

#include "avx512_vbmi.hpp"

namespace thrifty {
namespace {

/// Rows of x that fill a tile register, and bytes, that is columns, of one of its rows.
constexpr size_t kTokens = 16;
constexpr size_t kStep = 64;
constexpr size_t kTileBytes = kTokens * kStep;
/// Rows of x from which tiles pay.
constexpr size_t kFewTokens = 5;
/// Columns decoded at once, whole blocks of every format: two tiles of them stay in the first cache.
constexpr size_t kCols = 640;
/// Rows of x, at most, for which weights are decoded once, and bytes of them that stay in the second cache.
constexpr size_t kMostTokens = 256;
constexpr size_t kMostBytes = size_t{1} << 20;

/// Sixteen rows of x and sixteen of y.
struct Sums {
  alignas(64) int32_t values[kTokens][kTileRows];
};

/// 32 rows of x, in two registers: their columns, and the last ones, fewer than 64, filled up with zeros.
struct Block {
  const int8_t* x[2];
  size_t stride;
  const int8_t* rest[2];
};

/// sums += x . w^T for 16 * kBlocks rows of x and 16 * kTiles rows of w, `steps` times 64 columns and the rest.
template <int kBlocks, int kTiles>
void multiply(const Block& block, const int8_t (*w)[kCols * kTileRows], size_t steps, bool rest, bool zero,
              Sums* sums) {
  if (zero) {
    _tile_zero(0);
    if constexpr (kTiles > 1) _tile_zero(1);
    if constexpr (kBlocks > 1) _tile_zero(2);
    if constexpr (kBlocks > 1 && kTiles > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, sums[0].values, kStep);
    if constexpr (kTiles > 1) _tile_loadd(1, sums[1].values, kStep);
    if constexpr (kBlocks > 1) _tile_loadd(2, sums[2].values, kStep);
    if constexpr (kBlocks > 1 && kTiles > 1) _tile_loadd(3, sums[3].values, kStep);
  }
  const int8_t *x0 = block.x[0], *x1 = block.x[1], *w0 = w[0], *w1 = w[kTiles - 1];
  size_t stride = block.stride;
  for (size_t step = 0; step < steps + rest; ++step) {
    if (step == steps) {
      x0 = block.rest[0];
      x1 = block.rest[1];
      stride = kStep;
    }
    _tile_loadd(6, w0, kStep);
    _tile_loadd(4, x0, stride);
    _tile_dpbssd(0, 4, 6);
    if constexpr (kTiles > 1) {
      _tile_loadd(7, w1, kStep);
      _tile_dpbssd(1, 4, 7);
    }
    if constexpr (kBlocks > 1) {
      _tile_loadd(5, x1, stride);
      _tile_dpbssd(2, 5, 6);
    }
    if constexpr (kBlocks > 1 && kTiles > 1) _tile_dpbssd(3, 5, 7);
    x0 += kStep;
    x1 += kStep;
    w0 += kTileBytes;
    w1 += kTileBytes;
  }
  _tile_stored(0, sums[0].values, kStep);
  if constexpr (kTiles > 1) _tile_stored(1, sums[1].values, kStep);
  if constexpr (kBlocks > 1) _tile_stored(2, sums[2].values, kStep);
  if constexpr (kBlocks > 1 && kTiles > 1) _tile_stored(3, sums[3].values, kStep);
  publish(sums);
}

/// Products of tiles: rows of x are one operand as they lie in memory, 16 of 64 columns. Digit f of a block of weights,
/// a dword of 4 columns for each of 16 rows, is a row of the other, so that 16 of them, decoded, are one in its order.
template <class Decode>
class Tiles {
 public:
  explicit Tiles(const TernaryMatmul& m) : m_(m), cols_(m.blocks * kBlockCols) {}

  void run(size_t first, size_t end) {
    _tile_loadconfig(&kTileConfigs.rows[m_.n < kTokens ? m_.n : kTokens]);
    const size_t chunk = chunk_tokens();
    for (token_ = 0; token_ < m_.n; token_ += chunk) {
      count_ = m_.n - token_ < chunk ? m_.n - token_ : chunk;
      copy_rest();
      size_t tile = first;
      for (; tile + 2 <= end; tile += 2) product<2>(tile);
      if (tile < end) product<1>(tile);
    }
    _tile_release();
  }

 private:
  static constexpr size_t kBlockCols = 4 * Decode::kDigits;
  static_assert(kCols % kStep == 0 && kCols % kBlockCols == 0, "a chunk is whole steps and whole blocks");

  /// Rows of x for which weights are decoded once: equal chunks, whole blocks but for the last.
  size_t chunk_tokens() const {
    constexpr size_t block = 2 * kTokens;
    size_t most = kMostBytes / cols_ / block * block;
    most = most < block ? block : most > kMostTokens ? kMostTokens : most;
    const size_t chunks = (m_.n + most - 1) / most;
    return (m_.n + chunks * block - 1) / (chunks * block) * block;
  }

  /// First row of x in a register. The last of several also takes rows of the one before it.
  size_t start(size_t token) const { return token + kTokens <= m_.n ? token : m_.n < kTokens ? 0 : m_.n - kTokens; }

  void copy_rest() {
    const size_t rest = cols_ % kStep, from = cols_ - rest;
    if (rest == 0) return;
    const __mmask64 mask = (__mmask64{1} << rest) - 1;
    for (size_t i = 0; i < count_; i += kTokens) {
      const int8_t* x = m_.x + start(token_ + i) * m_.x_stride + from;
      for (size_t row = 0; row < kTokens && row < m_.n; ++row) {
        _mm512_store_si512(rest_[i + row], _mm512_maskz_loadu_epi8(mask, x + row * m_.x_stride));
      }
    }
    publish(rest_);
  }

  /// Codes of columns `from` to `to`, and zeros to the end of a step. Asks for what is decoded next: the columns after
  /// them, or the tiles after these.
  template <int kTiles>
  void decode(size_t tile, size_t from, size_t to) {
    const __m512i offset = _mm512_set1_epi8(char(Decode::kOffset));
    for (size_t t = 0; t < kTiles; ++t) {
      const size_t read = from / kBlockCols * kBlockBytes, tile_bytes = m_.blocks * kBlockBytes;
      const uint8_t* packed = m_.packed + (tile + t) * tile_bytes + read;
      const size_t ahead = to < cols_ ? kCols / kBlockCols * kBlockBytes : kTiles * tile_bytes - read;
      int8_t* w = w_[t];
      for (size_t col = from; col < to; col += kBlockCols, packed += kBlockBytes) {
        prefetch_far(packed + ahead);
        __m512i digits[Decode::kDigits];
        Decode::template digits<false>(_mm512_loadu_si512(packed), digits);
        for (int f = 0; f < Decode::kDigits; ++f, w += kBlockBytes) {
          _mm512_store_si512(w, _mm512_sub_epi8(digits[f], offset));
        }
      }
      for (size_t col = to; col % kStep != 0; col += 4, w += kBlockBytes) _mm512_store_si512(w, _mm512_setzero_si512());
    }
    publish(w_);
  }

  template <int kTiles>
  void product(size_t tile) {
    for (size_t from = 0; from < cols_; from += kCols) {
      const size_t to = from + kCols < cols_ ? from + kCols : cols_;
      decode<kTiles>(tile, from, to);
      for (size_t i = 0; i < count_; i += 2 * kTokens) {
        const size_t first = start(token_ + i), second = start(token_ + i + kTokens);
        const int8_t* x = m_.x + from;
        const Block block{
            {x + first * m_.x_stride, x + second * m_.x_stride}, m_.x_stride, {rest_[i], rest_[i + kTokens]}};
        Sums* sums = sums_[i / (2 * kTokens)];
        const size_t steps = (to - from) / kStep;
        const bool rest = (to - from) % kStep != 0;
        if (to == cols_) fetch_y<kTiles>(tile, i);
        if (count_ - i > kTokens) {
          multiply<2, kTiles>(block, w_, steps, rest, from == 0, sums);
        } else {
          multiply<1, kTiles>(block, w_, steps, rest, from == 0, sums);
        }
        if (to == cols_) finish<kTiles>(tile, i, sums);
      }
    }
  }

  /// Asks for the lines of y of a block of rows, which its multiplication hides.
  template <int kTiles>
  void fetch_y(size_t tile, size_t i) const {
    for (size_t row = i; row < i + 2 * kTokens && row < count_; ++row) {
      const float* y = place_of(m_.out, tile, token_ + row);
      prefetch_write(y);
      if (kTiles > 1 && m_.out.epilogue != THRIFTY_GATE_UP) prefetch_write(y + kTileRows);
    }
  }

  /// y of a block of rows of x.
  template <int kTiles>
  void finish(size_t tile, size_t i, const Sums* sums) const {
    // A copy, so that the compiler sees that no store of y changes it.
    const Output out = m_.out;
    if (kTiles == 2 && out.epilogue == THRIFTY_GATE_UP) {
      return each_row<kTiles>(tile, i, sums, [&](size_t token, const __m512* values) {
        emit_pair<Avx512>(out, tile, token, values[0], values[kTiles - 1]);
      });
    }
    // What most products do, without a question at every row.
    const bool plain = out.epilogue == THRIFTY_STORE || (out.epilogue == THRIFTY_ADD && !out.factors);
    if (plain && !out.bias && (tile + kTiles) * kTileRows <= out.cols) {
      float* y = out.y + tile * kTileRows;
      const __mmask16 add = out.epilogue == THRIFTY_ADD ? 0xFFFF : 0;
      return each_row<kTiles>(tile, i, sums, [&](size_t token, const __m512* values) {
        for (size_t t = 0; t < kTiles; ++t) {
          float* to = y + token * out.stride + t * kTileRows;
          const __m512 before = _mm512_maskz_loadu_ps(add, to);
          _mm512_storeu_ps(to, _mm512_mask_add_ps(values[t], add, before, values[t]));
        }
      });
    }
    each_row<kTiles>(tile, i, sums, [&](size_t token, const __m512* values) {
      for (size_t t = 0; t < kTiles; ++t) emit<Avx512>(out, tile + t, token, values[t]);
    });
  }

  template <int kTiles, class Emit>
  void each_row(size_t tile, size_t i, const Sums* sums, const Emit& emit_row) const {
    const float* x_scales = m_.x_scales;
    __m512 scales[kTiles], values[kTiles];
    for (size_t t = 0; t < kTiles; ++t) scales[t] = scale_of<Avx512>(m_, tile + t);
    for (size_t part = 0; part < 2; ++part, i += kTokens, sums += 2) {
      const size_t first = start(token_ + i);
      for (size_t row = i; row < i + kTokens && row < count_; ++row) {
        const size_t token = token_ + row;
        const __m512 x_scale = _mm512_set1_ps(x_scales[token]);
        for (size_t t = 0; t < kTiles; ++t) {
          const __m512 products = Avx512::load(sums[t].values[token - first]);
          values[t] = _mm512_mul_ps(products, _mm512_mul_ps(x_scale, scales[t]));
        }
        emit_row(token, values);
      }
    }
  }

  const TernaryMatmul& m_;
  const size_t cols_;
  size_t token_ = 0, count_ = 0;
  alignas(64) int8_t w_[2][kCols * kTileRows];
  alignas(64) int8_t rest_[kMostTokens][kStep];
  Sums sums_[kMostTokens / (2 * kTokens)][4];  // of rows of x, then of y
};

using Matmul = void (*)(const TernaryMatmul& m, size_t first, size_t end);

/// Rows of x so few that decoding is most of the work go to `few`, which does it in place.
template <class Decode>
void run_rows(const TernaryMatmul& m, size_t first, size_t end, Matmul few) {
  if (m.n < kFewTokens) return few(m, first, end);
  Tiles<Decode>(m).run(first, end);
}

}  // namespace

namespace amx {

void matmul_i2(const TernaryMatmul& m, size_t first, size_t end) { run_rows<I2>(m, first, end, avx512::matmul_i2); }
void matmul_base3(const TernaryMatmul& m, size_t first, size_t end) {
  run_rows<Base3>(m, first, end, avx512_vbmi::matmul_base3);
}
void matmul_i8(const TernaryMatmul& m, size_t first, size_t end) { run_rows<I8>(m, first, end, avx512::matmul_i8); }
void matmul_i4(const TernaryMatmul& m, size_t first, size_t end) { run_rows<I4>(m, first, end, avx512::matmul_i4); }

}  // namespace amx
}  // namespace thrifty
