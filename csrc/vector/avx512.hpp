#pragma once

#include <immintrin.h>

#include <cmath>

#include "math.hpp"
#include "scalars.hpp"

namespace thrifty {
namespace {

/// `Generic` of vector/generic.hpp in one register.
struct Avx512 {
  static constexpr int kBlocks = 4;
  using F = __m512;

  static F set(float v) { return _mm512_set1_ps(v); }
  static F load(const float* from) { return _mm512_loadu_ps(from); }
  static F load(const Half* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static F load(const Bfloat* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static F load(const int32_t* from) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(from)); }
  static F load(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static void store(float* to, F v) { _mm512_storeu_ps(to, v); }
  static void store(Half* to, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(int8_t* to, F v) {
    const __m512i words = _mm512_cvt_roundps_epi32(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(words));
  }
  using Bytes = __m512i;
  using Sums = __m512i;
  using Code = int8_t;
  static constexpr int kWeightParts = 2;
  static Bytes load_bytes(const uint8_t* from) { return _mm512_loadu_si512(from); }
  static Sums no_sums() { return _mm512_setzero_si512(); }
  static Sums dot(Sums sums, Bytes bytes, const Code* four) {
    int32_t word;
    std::memcpy(&word, four, 4);
    return _mm512_dpbusd_epi32(sums, bytes, _mm512_set1_epi32(word));
  }
  static Sums join(Sums high, Sums low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }
  static F floats(Sums sums, int32_t offset) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, _mm512_set1_epi32(offset)));
  }
  static void store_codes(Code* to, F v) { store(to, v); }
  static void store_weights(Code* to, size_t stride, F v) {
    const __m512i whole = _mm512_cvtps_epi32(v);
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + stride), _mm512_cvtepi32_epi8(whole));
  }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F madd(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F scale(F a, F n) { return _mm512_scalef_ps(a, n); }
  static F where_negative(F x, F a, F b) {
    return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), a);
  }
  static F first(size_t count, F a, F b) {
    return _mm512_mask_mov_ps(b, count >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << count) - 1), a);
  }
};

template <>
inline float sum<Avx512>(__m512 v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <>
inline float largest<Avx512>(__m512 v) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  const float most = _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) ? NAN : most;
}

}  // namespace
}  // namespace thrifty
