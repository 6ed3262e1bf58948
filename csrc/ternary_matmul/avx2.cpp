#include "../vector/avx2.hpp"

#include <immintrin.h>

#include "../prefetch.hpp"
#include "driver.hpp"

namespace thrifty {
namespace {

/// Four fields of two bits in every byte, and for base 3 the fifth digit apart.
struct Digits {
  __m256i fields;
  __m256i fifth;
};

template <int kBits, int kDigit>
inline __m256i digit(const Digits& d) {
  if constexpr (kDigit == 4) return d.fifth;
  const __m256i mask = _mm256_set1_epi8((1 << kBits) - 1);
  return _mm256_and_si256(kDigit ? _mm256_srli_epi16(d.fields, kBits * kDigit) : d.fields, mask);
}

struct I4 {
  static constexpr int kDigits = 2;
  static constexpr int kBits = 4;
  static constexpr int kOffset = 7;

  static Digits decode(__m256i bytes) { return {bytes, bytes}; }
};

struct I2 {
  static constexpr int kDigits = 4;
  static constexpr int kBits = 2;
  static constexpr int kOffset = 1;

  static Digits decode(__m256i bytes) { return {bytes, bytes}; }
};

/// byte = 81 d4 + 9 q + m, and q and m, both below 9, are looked up.
struct Base3 {
  static constexpr int kDigits = 5;
  static constexpr int kBits = 2;
  static constexpr int kOffset = 1;

  static __m256i at_least(__m256i bytes, int bound) {
    return _mm256_cmpeq_epi8(_mm256_max_epu8(bytes, _mm256_set1_epi8(char(bound))), bytes);
  }

  static Digits decode(__m256i bytes) {
    const __m256i one = at_least(bytes, 81), two = at_least(bytes, 162), c81 = _mm256_set1_epi8(81);
    const __m256i r = _mm256_sub_epi8(_mm256_sub_epi8(bytes, _mm256_and_si256(one, c81)), _mm256_and_si256(two, c81));
    // r / 9 = r * 57 >> 9 for r < 81, in the even and the odd bytes.
    const __m256i even = _mm256_srli_epi16(_mm256_maddubs_epi16(r, _mm256_set1_epi16(57)), 9);
    const __m256i odd = _mm256_srli_epi16(_mm256_maddubs_epi16(r, _mm256_set1_epi16(57 << 8)), 1);
    const __m256i q = _mm256_or_si256(even, _mm256_and_si256(odd, _mm256_set1_epi16(0x0F00)));
    const __m256i m = _mm256_sub_epi8(r, _mm256_add_epi8(q, _mm256_slli_epi16(q, 3)));
    const __m256i pairs = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 0, 0, 0, 0, 0, 0, 0));
    const __m256i high = _mm256_slli_epi16(_mm256_shuffle_epi8(pairs, q), 4);
    return {_mm256_or_si256(_mm256_shuffle_epi8(pairs, m), high), _mm256_abs_epi8(_mm256_add_epi8(one, two))};
  }
};

int32_t sum_of(const int8_t* x, size_t count) {
  const __m256i bytes = _mm256_set1_epi8(1), words = _mm256_set1_epi16(1);
  __m256i sum = _mm256_setzero_si256();
  size_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i)));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, words));
  }
  alignas(32) int32_t parts[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(parts), sum);
  int32_t total = 0;
  for (int32_t part : parts) total += part;
  for (; i < count; ++i) total += x[i];
  return total;
}

/// Products with `vpmaddubsw`, summed in int16 and flushed to int32 before they overflow.
template <class Format>
struct Maddubs {
  static constexpr int kOffset = Format::kOffset;
  static constexpr int kDigits = Format::kDigits;
  static constexpr size_t kBlockCols = 4 * kDigits;
  static constexpr int kTiles = 1;
  static constexpr int kGroup = 4;
  // One addition is at most 2 * (2 * offset) * 128 in magnitude, so that 64 / offset of them stay within int16 (only
  // -128 reaches its end).
  static constexpr size_t kFlush = 64 / kOffset / kDigits;

  static int32_t row_sum(const int8_t* x, size_t count) { return sum_of(x, count); }

  template <int kDigit, int kRows>
  static void add_digits(const Digits* halves, const int8_t* x, size_t stride, __m256i (*acc)[2]) {
    const __m256i low = digit<Format::kBits, kDigit>(halves[0]), high = digit<Format::kBits, kDigit>(halves[1]);
    for (int row = 0; row < kRows; ++row) {
      const __m256i xs = _mm256_set1_epi32(load_dword(x + size_t(row) * stride + 4 * kDigit));
      acc[row][0] = _mm256_add_epi16(acc[row][0], _mm256_maddubs_epi16(low, xs));
      acc[row][1] = _mm256_add_epi16(acc[row][1], _mm256_maddubs_epi16(high, xs));
    }
  }

  template <int kRows>
  static void add_blocks(const uint8_t* packed, const int8_t* x, size_t stride, size_t count, __m256i (*wide)[2]) {
    __m256i acc[kRows][2];
    for (auto& halves : acc) halves[0] = halves[1] = _mm256_setzero_si256();
    for (; count > 0; --count, packed += kBlockBytes, x += kBlockCols) {
      prefetch(packed + kPrefetch);
      const auto* block = reinterpret_cast<const __m256i*>(packed);
      const Digits halves[2] = {Format::decode(_mm256_loadu_si256(block)),
                                Format::decode(_mm256_loadu_si256(block + 1))};
      add_digits<0, kRows>(halves, x, stride, acc);
      add_digits<1, kRows>(halves, x, stride, acc);
      if constexpr (kDigits > 2) {
        add_digits<2, kRows>(halves, x, stride, acc);
        add_digits<3, kRows>(halves, x, stride, acc);
      }
      if constexpr (kDigits == 5) add_digits<4, kRows>(halves, x, stride, acc);
    }
    for (int row = 0; row < kRows; ++row) {
      for (int half = 0; half < 2; ++half) {
        const __m256i sums = _mm256_madd_epi16(acc[row][half], _mm256_set1_epi16(1));
        wide[row][half] = _mm256_add_epi32(wide[row][half], sums);
      }
    }
  }

  template <int, int kRows>
  static void product(const TernaryMatmul& m, size_t tile, size_t, size_t token, const int32_t* sums) {
    __m256i wide[kRows][2];
    for (auto& halves : wide) halves[0] = halves[1] = _mm256_setzero_si256();
    const uint8_t* packed = m.packed + tile * m.blocks * kBlockBytes;
    const int8_t* x = m.x + token * m.x_stride;
    for (size_t block = 0; block < m.blocks; block += kFlush) {
      const size_t count = m.blocks - block < kFlush ? m.blocks - block : kFlush;
      add_blocks<kRows>(packed + block * kBlockBytes, x + block * kBlockCols, m.x_stride, count, wide);
    }
    for (int row = 0; row < kRows; ++row) {
      alignas(32) int32_t products[kTileRows];
      _mm256_store_si256(reinterpret_cast<__m256i*>(products), wide[row][0]);
      _mm256_store_si256(reinterpret_cast<__m256i*>(products + 8), wide[row][1]);
      store_tile<Avx2>(m, tile, token + size_t(row), products, sums[row]);
    }
  }
};

/// Bytes of weights widened to 16 bits, since two byte products of 254 * 127 would not fit `vpmaddubsw`.
struct Words {
  static constexpr int kOffset = 127;
  static constexpr size_t kBlockCols = kI8Cols;
  static constexpr int kTiles = 1;
  static constexpr int kGroup = 2;

  static int32_t row_sum(const int8_t* x, size_t count) { return sum_of(x, count); }

  template <int, int kRows>
  static void product(const TernaryMatmul& m, size_t tile, size_t, size_t token, const int32_t* sums) {
    __m256i acc[kRows][4];  // of four rows of the tile each, columns 0 + 1 and 2 + 3 apart
    for (auto& quads : acc)
      for (auto& sum : quads) sum = _mm256_setzero_si256();
    const uint8_t* packed = m.packed + tile * m.blocks * kBlockBytes;
    const int8_t* x = m.x + token * m.x_stride;
    for (size_t block = 0; block < m.blocks; ++block, packed += kBlockBytes, x += kBlockCols) {
      prefetch(packed + kPrefetch);
      __m256i xs[kRows];
      for (int row = 0; row < kRows; ++row) {
        xs[row] = _mm256_cvtepi8_epi16(_mm_set1_epi32(load_dword(x + size_t(row) * m.x_stride)));
      }
      for (int quad = 0; quad < 4; ++quad) {
        const auto* bytes = reinterpret_cast<const __m128i*>(packed) + quad;
        const __m256i w = _mm256_cvtepu8_epi16(_mm_loadu_si128(bytes));
        for (int row = 0; row < kRows; ++row) {
          acc[row][quad] = _mm256_add_epi32(acc[row][quad], _mm256_madd_epi16(w, xs[row]));
        }
      }
    }
    for (int row = 0; row < kRows; ++row) {
      alignas(32) int32_t pairs[2 * kTileRows], products[kTileRows];
      for (int quad = 0; quad < 4; ++quad) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(pairs) + quad, acc[row][quad]);
      }
      for (size_t lane = 0; lane < kTileRows; ++lane) products[lane] = pairs[2 * lane] + pairs[2 * lane + 1];
      store_tile<Avx2>(m, tile, token + size_t(row), products, sums[row]);
    }
  }
};

}  // namespace

namespace avx2 {

void matmul_i2(const TernaryMatmul& m, size_t first, size_t end) { run_tiles<Maddubs<I2>>(m, first, end); }
void matmul_base3(const TernaryMatmul& m, size_t first, size_t end) { run_tiles<Maddubs<Base3>>(m, first, end); }
void matmul_i8(const TernaryMatmul& m, size_t first, size_t end) { run_tiles<Words>(m, first, end); }
void matmul_i4(const TernaryMatmul& m, size_t first, size_t end) { run_tiles<Maddubs<I4>>(m, first, end); }

}  // namespace avx2
}  // namespace thrifty
