#pragma once

#include <immintrin.h>

#include "scalars.hpp"

namespace thrifty {
namespace {

/// `Generic` of vector/generic.hpp in two registers.
struct Avx2 {
  static constexpr int kBlocks = 1;
  struct F {
    __m256 low, high;
  };

  static F set(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static F load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  static F load(const Half* from) { return {_mm256_cvtph_ps(quad(from)), _mm256_cvtph_ps(quad(from + 8))}; }
  static F load(const Bfloat* from) { return {widen8(from), widen8(from + 8)}; }
  static F load(const int32_t* from) {
    const auto* words = reinterpret_cast<const __m256i*>(from);
    return {_mm256_cvtepi32_ps(_mm256_loadu_si256(words)), _mm256_cvtepi32_ps(_mm256_loadu_si256(words + 1))};
  }
  static F load(const int8_t* from) {
    const __m128i bytes = quad(from);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
  }
  static void store(float* to, F v) {
    _mm256_storeu_ps(to, v.low);
    _mm256_storeu_ps(to + 8, v.high);
  }
  static void store(Half* to, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v.low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), _mm256_cvtps_ph(v.high, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(int8_t* to, F v) {
    const F r = round(v);
    const __m128i low = pack(_mm256_cvtps_epi32(r.low)), high = pack(_mm256_cvtps_epi32(r.high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(low, high));
  }
  struct Bytes {
    __m256i words[4];  // of four lanes each
  };
  using Sums = Bytes;  // of bytes 0 and 1, 2 and 3 of a lane
  using Code = int16_t;
  static constexpr int kWeightParts = 1;
  static Bytes load_bytes(const uint8_t* from) {
    Bytes b;
    for (int i = 0; i < 4; ++i) b.words[i] = _mm256_cvtepu8_epi16(quad(from + 16 * i));
    return b;
  }
  static Sums no_sums() {
    const __m256i zero = _mm256_setzero_si256();
    return {{zero, zero, zero, zero}};
  }
  static Sums dot(Sums sums, Bytes bytes, const Code* four) {
    int64_t words;
    std::memcpy(&words, four, 8);
    const __m256i each = _mm256_set1_epi64x(words);
    for (int i = 0; i < 4; ++i) {
      sums.words[i] = _mm256_add_epi32(sums.words[i], _mm256_madd_epi16(bytes.words[i], each));
    }
    return sums;
  }
  static Sums join(Sums high, Sums) { return high; }
  static F floats(Sums sums, int32_t offset) {
    const __m256i less = _mm256_set1_epi32(offset);
    const auto lanes = [&](__m256i a, __m256i b) {
      const __m256i mixed = _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xD8);
      return _mm256_cvtepi32_ps(_mm256_sub_epi32(mixed, less));
    };
    return {lanes(sums.words[0], sums.words[1]), lanes(sums.words[2], sums.words[3])};
  }
  static void store_codes(Code* to, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), pack(_mm256_cvtps_epi32(v.low)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), pack(_mm256_cvtps_epi32(v.high)));
  }
  static void store_weights(Code* to, size_t, F v) { store_codes(to, v); }
  static F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  static F sub(F a, F b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
  static F mul(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
  static F div(F a, F b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
  static F madd(F a, F b, F c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  static F max(F a, F b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
  static F abs(F a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
  }
  static F round(F a) {
    return {_mm256_round_ps(a.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(a.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  static F scale(F a, F n) { return {_mm256_mul_ps(a.low, power(n.low)), _mm256_mul_ps(a.high, power(n.high))}; }
  static F where_negative(F x, F a, F b) {
    const __m256 zero = _mm256_setzero_ps();
    return {_mm256_blendv_ps(b.low, a.low, _mm256_cmp_ps(x.low, zero, _CMP_LT_OQ)),
            _mm256_blendv_ps(b.high, a.high, _mm256_cmp_ps(x.high, zero, _CMP_LT_OQ))};
  }
  static F first(size_t count, F a, F b) {
    const __m256i wanted = _mm256_set1_epi32(count < 16 ? int(count) : 16);
    const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
    return {_mm256_blendv_ps(b.low, a.low, _mm256_castsi256_ps(_mm256_cmpgt_epi32(wanted, low))),
            _mm256_blendv_ps(b.high, a.high, _mm256_castsi256_ps(_mm256_cmpgt_epi32(wanted, high)))};
  }

 private:
  static __m128i quad(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
  static __m256 widen8(const Bfloat* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(quad(from)), 16));
  }
  static __m128i pack(__m256i words) {
    return _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
  static __m256 power(__m256 n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  }
};

}  // namespace
}  // namespace thrifty
