#include <immintrin.h>

#include "loops.hpp"

namespace thrifty {
namespace {

struct Line {
  __m512i v = _mm512_setzero_si512();

  static Line load(const char* line) { return {_mm512_loadu_si512(line)}; }
  void operator^=(const Line& other) { v = _mm512_xor_si512(v, other.v); }
  uint64_t fold() const {
    alignas(64) uint64_t w[8];
    _mm512_store_si512(w, v);
    return w[0] ^ w[1] ^ w[2] ^ w[3] ^ w[4] ^ w[5] ^ w[6] ^ w[7];
  }
};

}  // namespace

uint64_t avx512::read(const void* bytes, size_t count, int loop) { return read_lines<Line>(bytes, count, loop); }

}  // namespace thrifty
