#pragma once

#include <cstddef>
#include <cstdint>

#include "thrifty.h"

namespace thrifty {

/// The facts of a format that sizes derive from; src/thrifty/spec/formats.py is their source.
struct FormatFacts {
  size_t codes_per_byte;
  unsigned radix;
  size_t row_multiple;
  size_t col_multiple;
};

constexpr FormatFacts kFormats[THRIFTY_FORMAT_COUNT] = {
    {4, 4, 16, 16},  // I2
    {5, 3, 16, 20},  // BASE3
    {4, 4, 4, 1},    // ROW_BLOCK
};

constexpr size_t round_up(size_t count, size_t multiple) { return (count + multiple - 1) / multiple * multiple; }

/// Most columns: kernels sum digits times up to 81, 2 * 81 * 128 for one column in five, in int32.
constexpr int64_t kMostCols = int64_t{1} << 18;

inline bool valid_format(int format) { return format >= 0 && format < THRIFTY_FORMAT_COUNT; }
inline bool valid_shape(int64_t rows, int64_t cols) {
  return rows > 0 && cols > 0 && cols <= kMostCols && rows <= INT64_MAX / (2 * kMostCols);
}

}  // namespace thrifty
