#include <immintrin.h>

#include "steps.hpp"

namespace thrifty {
namespace {

constexpr size_t kWidth = 8;

/// What is left of a row after its last whole vectors, where there is no masked load of part of a vector.
inline __m256i first_lanes(size_t left) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(left < kWidth ? int(left) : int(kWidth)), index);
}

struct Avx2 {
  static __m256 load(const float* from, size_t i, size_t d) {
    return i + kWidth <= d ? _mm256_loadu_ps(from + i) : _mm256_maskload_ps(from + i, first_lanes(d - i));
  }

  static __m256 values(const float* x, const float* gain, __m256 r, size_t i, size_t d) {
    const __m256 v = _mm256_mul_ps(load(x, i, d), r);
    return gain ? _mm256_mul_ps(v, load(gain, i, d)) : v;
  }

  static float inverse_rms(const float* x, size_t d, float eps) {
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (size_t i = 0; i < d; i += kWidth) {
      const __m256 v = load(x, i, d);
      __m256& half = sum[i / kWidth % 2];
      half = _mm256_add_ps(half, _mm256_mul_ps(v, v));
    }
    alignas(32) float parts[kLanes];
    _mm256_store_ps(parts, sum[0]);
    _mm256_store_ps(parts + kWidth, sum[1]);
    return thrifty::inverse_rms(parts, d, eps);
  }

  static uint32_t largest(const float* x, const float* gain, float r, size_t d) {
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
    const __m256 rs = _mm256_set1_ps(r);
    __m256i most = _mm256_setzero_si256();
    for (size_t i = 0; i < d; i += kWidth) {
      // Lanes past the end are cleared after the product: 0 times an infinite r is a NaN.
      __m256i bits = _mm256_and_si256(_mm256_castps_si256(values(x, gain, rs, i, d)), magnitude);
      if (i + kWidth > d) bits = _mm256_and_si256(bits, first_lanes(d - i));
      most = _mm256_max_epi32(most, bits);
    }
    alignas(32) uint32_t parts[kWidth];
    _mm256_store_si256(reinterpret_cast<__m256i*>(parts), most);
    uint32_t result = 0;
    for (uint32_t part : parts) result = part > result ? part : result;
    return result;
  }

  static void round(const float* x, const float* gain, float r, float inverse, size_t d, int8_t* codes) {
    const __m256 rs = _mm256_set1_ps(r), inverses = _mm256_set1_ps(inverse);
    for (size_t i = 0; i < d; i += kWidth) {
      const __m256 scaled = _mm256_mul_ps(values(x, gain, rs, i, d), inverses);
      const __m256i words = _mm256_cvtps_epi32(_mm256_round_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
      const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(halves, halves));
      std::memcpy(codes + i, &bytes, d - i < kWidth ? d - i : kWidth);
    }
  }

  static void normalise(const float* x, const float* gain, float r, size_t d, float* y) {
    const __m256 rs = _mm256_set1_ps(r);
    size_t i = 0;
    for (; i + kWidth <= d; i += kWidth) _mm256_storeu_ps(y + i, values(x, gain, rs, i, d));
    if (i < d) _mm256_maskstore_ps(y + i, first_lanes(d - i), values(x, gain, rs, i, d));
  }
};

}  // namespace

namespace avx2 {

void quantize(const TokenRows& rows, size_t first, size_t end) { quantize_rows<Avx2>(rows, first, end); }
void rms_norm(const TokenRows& rows, size_t first, size_t end) { normalise_rows<Avx2>(rows, first, end); }

}  // namespace avx2
}  // namespace thrifty
