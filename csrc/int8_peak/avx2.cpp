#include <immintrin.h>

#include "../kernels.hpp"

namespace thrifty {

// `vpmaddubsw` and the addition of its sums in int16. An operand is a sum of its own, or the compiler would take the
// product out of the loop.
uint64_t avx2::multiply(uint64_t turns, uint32_t* sink) {
  constexpr int kSums = 12;
  __m256i sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = _mm256_set1_epi8(char(i + 1));
  const __m256i ones = _mm256_set1_epi8(1);
  for (uint64_t turn = 0; turn < turns; ++turn) {
    for (__m256i& sum : sums) sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(ones, sum));
  }
  for (const __m256i& sum : sums) *sink ^= uint32_t(_mm256_extract_epi32(sum, 0));
  return turns * kSums * 32;
}

}  // namespace thrifty
