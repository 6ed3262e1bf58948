#pragma once

#include <immintrin.h>

#include "../prefetch.hpp"
#include "../unroll.hpp"
#include "../vector/avx512.hpp"
#include "driver.hpp"

namespace thrifty {
namespace {

inline __m512i broadcast(const int8_t* x) { return _mm512_set1_epi32(load_dword(x)); }

/// Two-bit field of every byte, lowest first; left in its place, so worth 4^kField times as much, where kScaled.
template <int kField, bool kScaled>
inline __m512i field(__m512i bytes) {
  if constexpr (kScaled) return _mm512_and_si512(bytes, _mm512_set1_epi8(char(3 << (2 * kField))));
  return _mm512_and_si512(kField ? _mm512_srli_epi16(bytes, 2 * kField) : bytes, _mm512_set1_epi8(3));
}

/// A sum of scaled digits of kBits, exactly divided by what digit kDigit was multiplied with: 81 for the fifth.
template <int kBits, int kDigit>
inline __m512i unscale(__m512i sum) {
  constexpr uint32_t inverse_of_81 = 0x781948B1u;
  static_assert(81u * inverse_of_81 == 1u, "inverse modulo 2^32");
  if constexpr (kDigit == 4) return _mm512_mullo_epi32(sum, _mm512_set1_epi32(int(inverse_of_81)));
  return _mm512_srai_epi32(sum, kBits * kDigit);
}

struct I2 {
  static constexpr int kDigits = 4;
  static constexpr int kBits = 2;
  static constexpr int kOffset = 1;

  template <bool kScaled>
  static void digits(__m512i block, __m512i* out) {
    out[0] = field<0, kScaled>(block);
    out[1] = field<1, kScaled>(block);
    out[2] = field<2, kScaled>(block);
    out[3] = field<3, kScaled>(block);
  }
};

/// The fifth base-3 digit of every byte 81 d4 + r, by two compares, worth 81 times as much where kScaled; returns r.
template <bool kScaled>
inline __m512i take_fifth(__m512i bytes, __m512i* fifth) {
  const __m512i c81 = _mm512_set1_epi8(81), c162 = _mm512_set1_epi8(char(162));
  const __mmask64 one = _mm512_cmpge_epu8_mask(bytes, c81), two = _mm512_cmpge_epu8_mask(bytes, c162);
  const __m512i worth = _mm512_mask_mov_epi8(_mm512_maskz_mov_epi8(one, c81), two, c162);
  const __m512i c1 = _mm512_set1_epi8(1), c2 = _mm512_set1_epi8(2);
  *fifth = kScaled ? worth : _mm512_mask_mov_epi8(_mm512_maskz_mov_epi8(one, c1), two, c2);
  return _mm512_sub_epi8(bytes, worth);
}

struct I8 {
  static constexpr int kDigits = 1;
  static constexpr int kBits = 8;
  static constexpr int kOffset = 127;

  template <bool>
  static void digits(__m512i block, __m512i* out) {
    out[0] = block;
  }
};

struct I4 {
  static constexpr int kDigits = 2;
  static constexpr int kBits = 4;
  static constexpr int kOffset = 7;

  template <bool kScaled>
  static void digits(__m512i block, __m512i* out) {
    const __m512i low = _mm512_set1_epi8(15);
    out[0] = _mm512_and_si512(block, low);
    out[1] = kScaled ? _mm512_andnot_si512(low, block) : _mm512_and_si512(_mm512_srli_epi16(block, 4), low);
  }
};

/// How much later to ask for the second of two streams, so that the two are not at the same place of a page at a time:
/// such requests get in each other's way.
inline size_t stagger(size_t apart) { return (apart + kPage / 8) % kPage < kPage / 4 ? kPage / 4 : 0; }

/// Products with `vpdpbusd`: a dword of weights per row meets one dword of x, broadcast, and no sum crosses lanes.
/// `Decode` gives kDigits and `digits<scaled>(block, out)`: the unsigned digits of a block, one register per place.
///
/// Two tiles at a time: two streams draw more from memory than one, and x is broadcast once for both.
///
/// For few rows decoding is what costs, so digits stay in their place in the byte, each has a sum of its own, and the
/// sums are divided at the end.
template <class Decode>
struct Vnni {
  static constexpr int kDigits = Decode::kDigits;
  static constexpr int kOffset = Decode::kOffset;
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
  static void product(const TernaryMatmul& m, size_t tile, size_t step, size_t token, const int32_t* sums) {
    constexpr bool kScaled = kTileCount * kRows * kDigits <= 20;
    constexpr int kSums = kScaled ? kDigits : 1;
    __m512i acc[kTileCount][kRows][kSums];
    for (auto& tiles : acc)
      for (auto& rows : tiles)
        for (auto& sum : rows) sum = _mm512_setzero_si512();
    const size_t tile_bytes = m.blocks * kBlockBytes, step_bytes = step * tile_bytes;
    const uint8_t* packed = m.packed + tile * tile_bytes;
    const int8_t* x = m.x + token * m.x_stride;
    const size_t ahead[2] = {kPrefetch, kPrefetch - stagger(step_bytes)};
    // What ends a tile is read and written once: fetched while its weights pass, it keeps nobody waiting.
    for (int t = 0; t < kTileCount && kRows == 1; ++t) {
      prefetch(m.w_scale + (m.scale_per_row ? (tile + size_t(t) * step) * kTileRows : 0));
      prefetch_write(place_of(m.out, tile + size_t(t) * step, token));
    }
    const auto take_block = [&] {
      __m512i digits[kTileCount][kDigits];
      for (int t = 0; t < kTileCount; ++t) {
        prefetch(packed + size_t(t) * step_bytes + ahead[t]);
        Decode::template digits<kScaled>(_mm512_loadu_si512(packed + size_t(t) * step_bytes), digits[t]);
      }
      for (int f = 0; f < kDigits; ++f) {
        for (int row = 0; row < kRows; ++row) {
          const __m512i xs = broadcast(x + size_t(row) * m.x_stride + 4 * f);
          for (int t = 0; t < kTileCount; ++t) {
            __m512i& sum = acc[t][row][kScaled ? f : 0];
            sum = _mm512_dpbusd_epi32(sum, digits[t][f], xs);
          }
        }
      }
      packed += kBlockBytes;
      x += kBlockCols;
    };
    // With one row memory sets the pace, which requests that come in bursts do not keep.
    if constexpr (kRows == 1) {
      for (size_t block = 0; block < m.blocks; ++block) take_block();
    } else {
      THRIFTY_UNROLL
      for (size_t block = 0; block < m.blocks; ++block) take_block();
    }
    for (int t = 0; t < kTileCount; ++t) {
      for (int row = 0; row < kRows; ++row) {
        __m512i sum = acc[t][row][0];
        if constexpr (kScaled && kDigits > 1) sum = _mm512_add_epi32(sum, unscale<Decode::kBits, 1>(acc[t][row][1]));
        if constexpr (kScaled && kDigits > 2) {
          sum = _mm512_add_epi32(sum, unscale<Decode::kBits, 2>(acc[t][row][2]));
          sum = _mm512_add_epi32(sum, unscale<Decode::kBits, 3>(acc[t][row][3]));
        }
        if constexpr (kScaled && kDigits > 4) sum = _mm512_add_epi32(sum, unscale<Decode::kBits, 4>(acc[t][row][4]));
        const __m512i exact = _mm512_sub_epi32(sum, _mm512_set1_epi32(sums[row]));
        finish_tile<Avx512>(m, tile + size_t(t) * step, token + size_t(row), _mm512_cvtepi32_ps(exact));
      }
    }
  }
};

}  // namespace
}  // namespace thrifty
