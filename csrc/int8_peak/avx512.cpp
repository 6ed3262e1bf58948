#include <immintrin.h>

#include "../kernels.hpp"

namespace thrifty {

uint64_t avx512::multiply(uint64_t turns, uint32_t* sink) {
  constexpr int kSums = 16;
  __m512i sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_epi32(i);
  const __m512i unsigned_bytes = _mm512_set1_epi8(char(200)), signed_bytes = _mm512_set1_epi8(-3);
  for (uint64_t turn = 0; turn < turns; ++turn) {
    for (__m512i& sum : sums) sum = _mm512_dpbusd_epi32(sum, unsigned_bytes, signed_bytes);
  }
  for (const __m512i& sum : sums) *sink ^= uint32_t(_mm512_reduce_add_epi32(sum));
  return turns * kSums * 64;
}

}  // namespace thrifty
