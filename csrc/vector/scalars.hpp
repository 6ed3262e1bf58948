#pragma once

#include <cstdint>
#include <cstring>

namespace thrifty {

/// Stored floats of 16 bits, as bits.
struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

namespace {

inline float widen(float value) { return value; }

inline float widen(Bfloat value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline float widen(Half value) {
  const uint32_t sign = uint32_t{value.bits} >> 15 << 31, rest = value.bits & 0x7FFFu;
  uint32_t bits;
  if (rest >= 0x7C00) {
    bits = rest << 13 | 0x7F800000u;
  } else {
    // Subnormals become normal by a product; 2^112 moves the exponent's bias from 15 to 127.
    bits = rest << 13;
    float scaled;
    std::memcpy(&scaled, &bits, 4);
    scaled *= 0x1p112f;
    std::memcpy(&bits, &scaled, 4);
  }
  bits |= sign;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

/// Nearest, ties to even, overflow to infinity.
inline Half narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return {uint16_t(sign | 0x7E00u | (bits >> 13 & 0x1FFu))};
  if (bits >= 0x47800000u) return {uint16_t(sign | 0x7C00u)};
  if (bits < 0x38800000u) {
    // Added to 0.5 the result's last bit is the subnormals' unit, and the addition rounds.
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return {uint16_t(sign | (bits - 0x3F000000u))};
  }
  return {uint16_t(sign | ((bits + 0xFFFu + (bits >> 13 & 1)) - 0x38000000u) >> 13)};
}

}  // namespace
}  // namespace thrifty
