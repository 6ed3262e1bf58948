#pragma once

#include <cmath>
#include <cstring>

#include "../kernels.hpp"
#include "../prefetch.hpp"

namespace thrifty {
namespace {

/// Partial sums of RMSNorm: element j goes to lane j mod 16.
constexpr size_t kLanes = 16;

constexpr float kQMax = 127.0f;
constexpr float kFloor = 1e-5f;

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

/// r = 1 / sqrt(mean + eps); the 16 partial sums are folded in halves.
inline float inverse_rms(float* lanes, size_t d, float eps) {
  for (size_t half = kLanes / 2; half > 0; half /= 2) {
    for (size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return 1.0f / std::sqrt(lanes[0] / float(d) + eps);
}

/// Quantisation of a row, once the largest |v| is known. Magnitudes are compared as integers: their order is that of
/// the values, and a NaN is above all of them instead of vanishing in a maximum.
struct RowScale {
  bool finite;
  float scale;    // of the row
  float inverse;  // 127 / a

  RowScale(uint32_t largest_bits) {
    const uint32_t floor = bits_of(kFloor);
    const float a = float_of(largest_bits > floor ? largest_bits : floor);
    finite = largest_bits < 0x7F800000u;
    scale = a / kQMax;
    inverse = kQMax / a;
  }
};

/// Quantises rows through `Steps`: `inverse_rms(x, d, eps)`, `largest(x, gain, r, d)`, which gives the bits of the
/// largest |v|, `round(x, gain, r, inverse, d, codes)` and `normalise(x, gain, r, d, y)`; v = (x * r) * gain, without
/// the gain where that is null. A row that is not to be normalised has r = 1 and no gain, which changes no bit of it.
template <class Steps>
void quantize_rows(const TokenRows& t, size_t first, size_t end) {
  for (size_t row = first; row < end; ++row) {
    const float* x = t.x + row * t.x_stride;
    int8_t* codes = t.codes + row * t.stride;
    const float* gain = t.norm ? t.gain : nullptr;
    // A row takes less time than the next one does to arrive from beyond the second cache.
    if (row + 1 < end) {
      for (size_t i = 0; i < t.d; i += 16) prefetch_far(x + t.x_stride + i);
    }
    const float r = t.norm ? Steps::inverse_rms(x, t.d, t.eps) : 1.0f;
    const RowScale s(Steps::largest(x, gain, r, t.d));
    if (s.finite) {
      Steps::round(x, gain, r, s.inverse, t.d, codes);
    } else {
      std::memset(codes, 0, t.d);
    }
    std::memset(codes + t.d, 0, t.stride - t.d);
    t.scales[row] = s.scale;
  }
}

template <class Steps>
void normalise_rows(const TokenRows& t, size_t first, size_t end) {
  for (size_t row = first; row < end; ++row) {
    const float* x = t.x + row * t.x_stride;
    Steps::normalise(x, t.gain, Steps::inverse_rms(x, t.d, t.eps), t.d, t.y + row * t.stride);
  }
}

}  // namespace
}  // namespace thrifty
