#include <arm_neon.h>

#include "../kernels.hpp"

namespace thrifty {

uint64_t neon::multiply(uint64_t turns, uint32_t* sink) {
  constexpr int kSums = 16;
  int16x8_t sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = vdupq_n_s16(int16_t(i));
  const int8x8_t three = vdup_n_s8(3), five = vdup_n_s8(5);
  for (uint64_t turn = 0; turn < turns; ++turn) {
    for (int16x8_t& sum : sums) sum = vmlal_s8(sum, three, five);
  }
  for (const int16x8_t& sum : sums) *sink ^= uint32_t(vaddvq_s16(sum));
  return turns * kSums * 8;
}

}  // namespace thrifty
