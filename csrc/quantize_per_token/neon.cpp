#include <arm_neon.h>

#include "steps.hpp"

namespace thrifty {
namespace {

constexpr size_t kWidth = 4;

/// Whole vectors first; the last elements of a row, where there is no masked load, one at a time.
struct Neon {
  static float32x4_t values(const float* x, const float* gain, float r, size_t i) {
    const float32x4_t v = vmulq_n_f32(vld1q_f32(x + i), r);
    return gain ? vmulq_f32(v, vld1q_f32(gain + i)) : v;
  }

  static float value(const float* x, const float* gain, float r, size_t i) {
    const float v = x[i] * r;
    return gain ? v * gain[i] : v;
  }

  static float inverse_rms(const float* x, size_t d, float eps) {
    float32x4_t sum[kLanes / kWidth] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
    size_t i = 0;
    for (; i + kLanes <= d; i += kLanes) {
      for (size_t part = 0; part < kLanes / kWidth; ++part) {
        const float32x4_t v = vld1q_f32(x + i + kWidth * part);
        sum[part] = vaddq_f32(sum[part], vmulq_f32(v, v));
      }
    }
    float lanes[kLanes];
    for (size_t part = 0; part < kLanes / kWidth; ++part) vst1q_f32(lanes + kWidth * part, sum[part]);
    for (; i < d; ++i) lanes[i % kLanes] += x[i] * x[i];
    return thrifty::inverse_rms(lanes, d, eps);
  }

  static uint32_t largest(const float* x, const float* gain, float r, size_t d) {
    uint32x4_t most = vdupq_n_u32(0);
    size_t i = 0;
    for (; i + kWidth <= d; i += kWidth) {
      const uint32x4_t bits = vreinterpretq_u32_f32(values(x, gain, r, i));
      most = vmaxq_u32(most, vandq_u32(bits, vdupq_n_u32(0x7FFFFFFFu)));
    }
    uint32_t result = vmaxvq_u32(most);
    for (; i < d; ++i) {
      const uint32_t bits = bits_of(value(x, gain, r, i)) & 0x7FFFFFFFu;
      if (bits > result) result = bits;
    }
    return result;
  }

  static void round(const float* x, const float* gain, float r, float inverse, size_t d, int8_t* codes) {
    size_t i = 0;
    for (; i + kWidth <= d; i += kWidth) {
      const int32x4_t words = vcvtnq_s32_f32(vmulq_n_f32(values(x, gain, r, i), inverse));
      const int16x4_t halves = vqmovn_s32(words);
      const int8x8_t bytes = vqmovn_s16(vcombine_s16(halves, halves));
      const int32_t four = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
      std::memcpy(codes + i, &four, kWidth);
    }
    for (; i < d; ++i) codes[i] = int8_t(std::nearbyint(value(x, gain, r, i) * inverse));
  }

  static void normalise(const float* x, const float* gain, float r, size_t d, float* y) {
    size_t i = 0;
    for (; i + kWidth <= d; i += kWidth) vst1q_f32(y + i, values(x, gain, r, i));
    for (; i < d; ++i) y[i] = value(x, gain, r, i);
  }
};

}  // namespace

namespace neon {

void quantize(const TokenRows& rows, size_t first, size_t end) { quantize_rows<Neon>(rows, first, end); }
void rms_norm(const TokenRows& rows, size_t first, size_t end) { normalise_rows<Neon>(rows, first, end); }

}  // namespace neon
}  // namespace thrifty
