#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "vector/scalars.hpp"

namespace thrifty {

/// Q8_0: a float16 in front of 32 signed bytes that it multiplies.
constexpr size_t kQ8Weights = 32, kQ8Bytes = 34;

namespace {

inline void dequantize_q8_0(const uint8_t* row, size_t cols, float* out) {
  for (size_t col = 0; col < cols; col += kQ8Weights, row += kQ8Bytes) {
    Half scale;
    std::memcpy(&scale, row, 2);
    const float d = widen(scale);
    int8_t codes[kQ8Weights];
    std::memcpy(codes, row + 2, kQ8Weights);
    for (size_t i = 0; i < kQ8Weights; ++i) out[col + i] = float(codes[i]) * d;
  }
}

}  // namespace
}  // namespace thrifty
