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
  int offset;         // digit = code + offset, at most 2 * offset
  int64_t most_cols;  // for sums in int32
};

/// Most columns: kernels sum digits times up to 81, 2 * 81 * 128 for one column in five, in int32; wide digits allow
/// fewer.
constexpr int64_t kMostCols = int64_t{1} << 18;

constexpr FormatFacts kFormats[THRIFTY_FORMAT_COUNT] = {
    {4, 4, 16, 16, 1, kMostCols},            // I2
    {5, 3, 16, 20, 1, kMostCols},            // BASE3
    {4, 4, 4, 1, 1, kMostCols},              // ROW_BLOCK
    {1, 256, 16, 4, 127, int64_t{1} << 16},  // I8
    {2, 16, 16, 8, 7, int64_t{1} << 17},     // I4
};

constexpr size_t round_up(size_t count, size_t multiple) { return (count + multiple - 1) / multiple * multiple; }

inline bool valid_format(int format) { return format >= 0 && format < THRIFTY_FORMAT_COUNT; }
inline bool valid_shape(int64_t rows, int64_t cols) {
  return rows > 0 && cols > 0 && cols <= kMostCols && rows <= INT64_MAX / (2 * kMostCols);
}

}  // namespace thrifty
