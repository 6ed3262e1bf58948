#include "../kernels.hpp"

namespace thrifty {

// An operand is a sum of its own, or the compiler would take the product out of the loop.
uint64_t generic::multiply(uint64_t turns, uint32_t* sink) {
  uint32_t sums[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  for (uint64_t turn = 0; turn < turns; ++turn) {
    for (uint32_t& sum : sums) sum += uint32_t(int8_t(sum) * 3);
  }
  for (uint32_t sum : sums) *sink ^= sum;
  return turns * 8;
}

}  // namespace thrifty
