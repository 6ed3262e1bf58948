#include "../vector/generic.hpp"

#include "driver.hpp"

namespace thrifty {
namespace {

template <size_t kCols, unsigned kRadix, int kAdded>
struct Scalar {
  static constexpr int kOffset = kAdded;
  static constexpr size_t kBlockCols = kCols;
  static constexpr int kTiles = 1;
  static constexpr int kGroup = 8;

  static int32_t row_sum(const int8_t* x, size_t count) {
    int32_t sum = 0;
    for (size_t i = 0; i < count; ++i) sum += x[i];
    return sum;
  }

  static void decode(const uint8_t* lane, uint8_t* digits) {
    for (size_t j = 0; j < 4; ++j) {
      unsigned value = lane[j];
      for (size_t f = 0; f < kCols / 4; ++f, value /= kRadix) digits[4 * f + j] = uint8_t(value % kRadix);
    }
  }

  template <int, int kRows>
  static void product(const TernaryMatmul& m, size_t tile, size_t, size_t token, const int32_t* sums) {
    int32_t acc[kRows][kTileRows] = {};
    const uint8_t* packed = m.packed + tile * m.blocks * kBlockBytes;
    for (size_t block = 0; block < m.blocks; ++block, packed += kBlockBytes) {
      for (size_t lane = 0; lane < kTileRows; ++lane) {
        uint8_t digits[kCols];
        decode(packed + 4 * lane, digits);
        for (int row = 0; row < kRows; ++row) {
          const int8_t* x = m.x + (token + size_t(row)) * m.x_stride + block * kCols;
          int32_t sum = 0;
          for (size_t i = 0; i < kCols; ++i) sum += digits[i] * x[i];
          acc[row][lane] += sum;
        }
      }
    }
    for (int row = 0; row < kRows; ++row) store_tile<Generic>(m, tile, token + size_t(row), acc[row], sums[row]);
  }
};

}  // namespace

namespace generic {

void matmul_i2(const TernaryMatmul& m, size_t first, size_t end) { run_tiles<Scalar<kI2Cols, 4, 1>>(m, first, end); }
void matmul_base3(const TernaryMatmul& m, size_t first, size_t end) {
  run_tiles<Scalar<kBase3Cols, 3, 1>>(m, first, end);
}
void matmul_i8(const TernaryMatmul& m, size_t first, size_t end) {
  run_tiles<Scalar<kI8Cols, 256, 127>>(m, first, end);
}
void matmul_i4(const TernaryMatmul& m, size_t first, size_t end) { run_tiles<Scalar<kI4Cols, 16, 7>>(m, first, end); }

}  // namespace generic
}  // namespace thrifty
