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

/// byte = 81 d4 + r: one permute over 128 entries turns r into its digits.
struct Base3 {
  static constexpr int kDigits = 5;
  static constexpr int kBits = 2;
  static constexpr int kOffset = 1;

  template <bool kScaled>
  static void digits(__m512i block, __m512i* out) {
    const __m512i r = take_fifth<kScaled>(block, out + 4);
    const __m512i fields =
        _mm512_permutex2var_epi8(_mm512_load_si512(kTable.fields), r, _mm512_load_si512(kTable.fields + 64));
    out[0] = field<0, kScaled>(fields);
    out[1] = field<1, kScaled>(fields);
    out[2] = field<2, kScaled>(fields);
    out[3] = field<3, kScaled>(fields);
  }
};

}  // namespace
}  // namespace thrifty
