#pragma once

#include <immintrin.h>

#include "../prefetch.hpp"
#include "driver.hpp"

namespace thrifty {
namespace {

inline __m512i broadcast(const int8_t* x) { return _mm512_set1_epi32(load_dword(x)); }

/// Two-bit fields of every byte, lowest first.
template <int kField>
inline __m512i field(__m512i bytes) {
  return _mm512_and_si512(kField ? _mm512_srli_epi16(bytes, 2 * kField) : bytes, _mm512_set1_epi8(3));
}

/// y of a tile from its sixteen sums.
inline void store_tile(const TernaryMatmul& m, size_t tile, size_t token, __m512i products, int32_t sum) {
  const size_t first = tile * kTileRows;
  const size_t count = m.rows - first < kTileRows ? m.rows - first : kTileRows;
  const __mmask16 lanes = __mmask16((1u << count) - 1);
  const __m512 w_scale = m.scale_per_row ? _mm512_maskz_loadu_ps(lanes, m.w_scale + first) : _mm512_set1_ps(*m.w_scale);
  const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(m.x_scales[token]), w_scale);
  __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(products, _mm512_set1_epi32(sum))), scale);
  if (m.bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(lanes, m.bias + first));
  _mm512_mask_storeu_ps(m.y + token * m.rows + first, lanes, y);
}

/// Products with `vpdpbusd`: a dword of weights per row meets one dword of x, broadcast, and no sum crosses lanes.
/// `Decode` gives kDigits and `digits(block, out)`: the unsigned digits of a block, one register per place.
template <class Decode>
struct Vnni {
  static constexpr int kDigits = Decode::kDigits;
  static constexpr size_t kBlockCols = 4 * kDigits;
  static constexpr int kTiles = 2;
  static constexpr int kGroup = 8;

  static int32_t row_sum(const int8_t* x, size_t count) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sum = _mm512_setzero_si512();
    size_t i = 0;
    for (; i + 64 <= count; i += 64) sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(x + i));
    const __mmask64 rest = (__mmask64{1} << (count - i)) - 1;
    sum = _mm512_dpbusd_epi32(sum, ones, _mm512_maskz_loadu_epi8(rest, x + i));
    return _mm512_reduce_add_epi32(sum);
  }

  template <int kTileCount, int kRows>
  static void product(const TernaryMatmul& m, size_t tile, size_t token, const int32_t* sums) {
    // A product needs five cycles before its sum can be added to, so few rows keep a sum per digit.
    constexpr int kSums = kTileCount * kRows * kDigits <= 20 ? kDigits : 1;
    __m512i acc[kTileCount][kRows][kSums];
    for (auto& tiles : acc)
      for (auto& rows : tiles)
        for (auto& sum : rows) sum = _mm512_setzero_si512();
    const size_t tile_bytes = m.blocks * kBlockBytes;
    const uint8_t* packed = m.packed + tile * tile_bytes;
    const int8_t* x = m.x + token * m.x_stride;
    for (size_t block = 0; block < m.blocks; ++block, packed += kBlockBytes, x += kBlockCols) {
      __m512i digits[kTileCount][kDigits];
      for (int t = 0; t < kTileCount; ++t) {
        prefetch(packed + size_t(t) * tile_bytes + kPrefetch);
        Decode::digits(_mm512_loadu_si512(packed + size_t(t) * tile_bytes), digits[t]);
      }
      for (int f = 0; f < kDigits; ++f) {
        for (int row = 0; row < kRows; ++row) {
          const __m512i xs = broadcast(x + size_t(row) * m.x_stride + 4 * f);
          for (int t = 0; t < kTileCount; ++t) {
            __m512i& sum = acc[t][row][kSums > 1 ? f : 0];
            sum = _mm512_dpbusd_epi32(sum, digits[t][f], xs);
          }
        }
      }
    }
    for (int t = 0; t < kTileCount; ++t) {
      for (int row = 0; row < kRows; ++row) {
        __m512i sum = acc[t][row][0];
        for (int i = 1; i < kSums; ++i) sum = _mm512_add_epi32(sum, acc[t][row][i]);
        store_tile(m, tile + size_t(t), token + size_t(row), sum, sums[row]);
      }
    }
  }
};

}  // namespace
}  // namespace thrifty
