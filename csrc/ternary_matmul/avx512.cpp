#include "avx512.hpp"

namespace thrifty {
namespace {

/// Without byte permutes over 128 entries: byte = 81 d4 + 9 q + m, and q and m, both below 9, are looked up.
struct Base3 {
  static constexpr int kDigits = 5;
  static constexpr int kBits = 2;
  static constexpr int kOffset = 1;

  /// Tables of the low and the high digit of 0 ... 8, times what the digit is worth.
  static __m512i low(char worth) {
    const char one = worth, two = char(2 * worth);
    return _mm512_broadcast_i32x4(_mm_setr_epi8(0, one, two, 0, one, two, 0, one, two, 0, 0, 0, 0, 0, 0, 0));
  }
  static __m512i high(char worth) {
    const char one = worth, two = char(2 * worth);
    return _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, one, one, one, two, two, two, 0, 0, 0, 0, 0, 0, 0));
  }

  template <bool kScaled>
  static void digits(__m512i block, __m512i* out) {
    const __m512i r = take_fifth<kScaled>(block, out + 4);

    // r / 9 = r * 57 >> 9 for r < 81, in the even and the odd bytes.
    const __m512i even = _mm512_srli_epi16(_mm512_maddubs_epi16(r, _mm512_set1_epi16(57)), 9);
    const __m512i odd = _mm512_srli_epi16(_mm512_maddubs_epi16(r, _mm512_set1_epi16(57 << 8)), 1);
    const __m512i q = _mm512_or_si512(even, _mm512_and_si512(odd, _mm512_set1_epi16(0x0F00)));
    const __m512i m = _mm512_sub_epi8(r, _mm512_add_epi8(q, _mm512_slli_epi16(q, 3)));
    constexpr char a = kScaled ? 4 : 1, b = kScaled ? 16 : 1, c = kScaled ? 64 : 1;
    out[0] = _mm512_shuffle_epi8(low(1), m);
    out[1] = _mm512_shuffle_epi8(high(a), m);
    out[2] = _mm512_shuffle_epi8(low(b), q);
    out[3] = _mm512_shuffle_epi8(high(c), q);
  }
};

}  // namespace

namespace avx512 {

void matmul_i2(const TernaryMatmul& m, size_t first, size_t end) { run_tiles<Vnni<I2>>(m, first, end); }
void matmul_base3(const TernaryMatmul& m, size_t first, size_t end) { run_tiles<Vnni<Base3>>(m, first, end); }
void matmul_i8(const TernaryMatmul& m, size_t first, size_t end) { run_tiles<Vnni<I8>>(m, first, end); }
void matmul_i4(const TernaryMatmul& m, size_t first, size_t end) { run_tiles<Vnni<I4>>(m, first, end); }

}  // namespace avx512
}  // namespace thrifty
