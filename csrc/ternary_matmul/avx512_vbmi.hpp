#pragma once

#include "avx512.hpp"

namespace thrifty {
namespace {

/// Entry r < 81: the four base-3 digits of r as four fields of two bits.
struct Table {
  uint8_t fields[128];

  constexpr Table() : fields() {
    for (unsigned r = 0; r < 81; ++r) {
      fields[r] = uint8_t(r % 3 | r / 3 % 3 << 2 | r / 9 % 3 << 4 | r / 27 << 6);
    }
  }
};

alignas(64) constexpr Table kTable;

/// byte = 81 d4 + r: two compares give 81 d4, one permute over 128 entries turns r into its digits.
struct Base3 {
  static constexpr int kDigits = 5;
  static constexpr int kBits = 2;
  static constexpr int kOffset = 1;

  template <bool kScaled>
  static void digits(__m512i block, __m512i* out) {
    const __m512i c81 = _mm512_set1_epi8(81), c162 = _mm512_set1_epi8(char(162));
    const __mmask64 one = _mm512_cmpge_epu8_mask(block, c81);
    const __mmask64 two = _mm512_cmpge_epu8_mask(block, c162);
    const __m512i fifth = _mm512_mask_mov_epi8(_mm512_maskz_mov_epi8(one, c81), two, c162);
    const __m512i r = _mm512_sub_epi8(block, fifth);
    const __m512i fields =
        _mm512_permutex2var_epi8(_mm512_load_si512(kTable.fields), r, _mm512_load_si512(kTable.fields + 64));
    out[0] = field<0, kScaled>(fields);
    out[1] = field<1, kScaled>(fields);
    out[2] = field<2, kScaled>(fields);
    out[3] = field<3, kScaled>(fields);
    out[4] = kScaled ? fifth
                     : _mm512_mask_mov_epi8(_mm512_maskz_mov_epi8(one, _mm512_set1_epi8(1)), two, _mm512_set1_epi8(2));
  }
};

}  // namespace
}  // namespace thrifty
