#include "avx512_vbmi.hpp"

namespace thrifty {

void avx512_vbmi::matmul_base3(const TernaryMatmul& m, size_t first, size_t end) {
  run_tiles<Vnni<Base3>>(m, first, end);
}

}  // namespace thrifty
