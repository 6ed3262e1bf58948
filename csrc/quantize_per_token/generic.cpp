#include "steps.hpp"

namespace thrifty {
namespace {

struct Scalar {
  static float value(const float* x, const float* gain, float r, size_t i) {
    const float v = x[i] * r;
    return gain ? v * gain[i] : v;
  }

  static float inverse_rms(const float* x, size_t d, float eps) {
    float lanes[kLanes] = {};
    for (size_t i = 0; i < d; ++i) lanes[i % kLanes] += x[i] * x[i];
    return thrifty::inverse_rms(lanes, d, eps);
  }

  static uint32_t largest(const float* x, const float* gain, float r, size_t d) {
    uint32_t most = 0;
    for (size_t i = 0; i < d; ++i) {
      const uint32_t bits = bits_of(value(x, gain, r, i)) & 0x7FFFFFFFu;
      if (bits > most) most = bits;
    }
    return most;
  }

  static void round(const float* x, const float* gain, float r, float inverse, size_t d, int8_t* codes) {
    for (size_t i = 0; i < d; ++i) codes[i] = int8_t(std::nearbyint(value(x, gain, r, i) * inverse));
  }

  static void normalise(const float* x, const float* gain, float r, size_t d, float* y) {
    for (size_t i = 0; i < d; ++i) y[i] = value(x, gain, r, i);
  }
};

}  // namespace

namespace generic {

void quantize(const TokenRows& rows, size_t first, size_t end) { quantize_rows<Scalar>(rows, first, end); }
void rms_norm(const TokenRows& rows, size_t first, size_t end) { normalise_rows<Scalar>(rows, first, end); }

}  // namespace generic
}  // namespace thrifty
