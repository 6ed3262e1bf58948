#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "vector/scalars.hpp"

namespace thrifty {

constexpr size_t kQ8Weights = 32;

/// Q8_0: a float16 and 32 signed bytes that it multiplies. Lies at any address.
struct Q8Block {
  uint8_t scale[2];
  int8_t codes[kQ8Weights];
};
static_assert(sizeof(Q8Block) == 34 && alignof(Q8Block) == 1, "a block has no padding");

namespace {

inline Half scale_of(const Q8Block& block) {
  Half stored;
  std::memcpy(&stored, block.scale, 2);
  return stored;
}

/// Products of a byte and a float16 are exact.
inline void dequantize_q8_0(const Q8Block* row, size_t cols, float* out) {
  for (size_t col = 0; col < cols; col += kQ8Weights, ++row) {
    const float d = widen(scale_of(*row));
    for (size_t i = 0; i < kQ8Weights; ++i) out[col + i] = float(row->codes[i]) * d;
  }
}

}  // namespace
}  // namespace thrifty
