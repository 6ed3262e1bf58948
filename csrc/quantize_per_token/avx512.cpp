#include <immintrin.h>

#include "steps.hpp"

namespace thrifty {
namespace {

struct Avx512 {
  static __mmask16 lanes(size_t left) { return left >= kLanes ? __mmask16(0xFFFF) : __mmask16((1u << left) - 1); }

  static __m512 values(const float* x, const float* gain, __m512 r, size_t i, __mmask16 some) {
    const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, x + i), r);
    return gain ? _mm512_mul_ps(v, _mm512_maskz_loadu_ps(some, gain + i)) : v;
  }

  static float inverse_rms(const float* x, size_t d, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (size_t i = 0; i < d; i += kLanes) {
      const __m512 v = _mm512_maskz_loadu_ps(lanes(d - i), x + i);
      sum = _mm512_add_ps(sum, _mm512_mul_ps(v, v));
    }
    alignas(64) float parts[kLanes];
    _mm512_store_ps(parts, sum);
    return thrifty::inverse_rms(parts, d, eps);
  }

  static uint32_t largest(const float* x, const float* gain, float r, size_t d) {
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    const __m512 rs = _mm512_set1_ps(r);
    __m512i most = _mm512_setzero_si512();
    for (size_t i = 0; i < d; i += kLanes) {
      // A masked load may not be multiplied into the maximum: 0 times an infinite r is a NaN.
      const __mmask16 some = lanes(d - i);
      const __m512i bits = _mm512_castps_si512(values(x, gain, rs, i, some));
      most = _mm512_mask_max_epi32(most, some, most, _mm512_and_si512(bits, magnitude));
    }
    return uint32_t(_mm512_reduce_max_epi32(most));
  }

  static void round(const float* x, const float* gain, float r, float inverse, size_t d, int8_t* codes) {
    const __m512 rs = _mm512_set1_ps(r), inverses = _mm512_set1_ps(inverse);
    for (size_t i = 0; i < d; i += kLanes) {
      const __mmask16 some = lanes(d - i);
      const __m512 scaled = _mm512_mul_ps(values(x, gain, rs, i, some), inverses);
      const __m512i rounded = _mm512_cvt_roundps_epi32(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm512_mask_cvtsepi32_storeu_epi8(codes + i, some, rounded);
    }
  }

  static void normalise(const float* x, const float* gain, float r, size_t d, float* y) {
    const __m512 rs = _mm512_set1_ps(r);
    for (size_t i = 0; i < d; i += kLanes) {
      const __mmask16 some = lanes(d - i);
      _mm512_mask_storeu_ps(y + i, some, values(x, gain, rs, i, some));
    }
  }
};

}  // namespace

namespace avx512 {

void quantize(const TokenRows& rows, size_t first, size_t end) { quantize_rows<Avx512>(rows, first, end); }
void rms_norm(const TokenRows& rows, size_t first, size_t end) { normalise_rows<Avx512>(rows, first, end); }

}  // namespace avx512
}  // namespace thrifty
