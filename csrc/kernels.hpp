#pragma once

#include <cstddef>
#include <cstdint>

namespace thrifty {

/// Rows of a tile, one per 32-bit lane of a 512-bit register, and bytes of a block: a dword per row.
constexpr size_t kTileRows = 16;
constexpr size_t kBlockBytes = 4 * kTileRows;

/// Columns that a block covers.
constexpr size_t kI2Cols = 16;
constexpr size_t kBase3Cols = 20;

/// Arguments of thrifty_ternary_matmul, checked.
struct TernaryMatmul {
  const uint8_t* packed;
  size_t blocks;  // in a tile
  size_t rows;
  const float* w_scale;
  bool scale_per_row;
  const float* bias;
  const int8_t* x;
  size_t x_stride;
  const float* x_scales;
  size_t n;
  float* y;
};

/// Arguments of thrifty_quantize_per_token and of thrifty_rms_norm, checked.
struct TokenRows {
  const float* x;
  const float* gain;
  float eps;
  bool norm;
  size_t d;
  int8_t* codes;
  size_t stride;
  float* scales;
  float* y;
};

/// What an instruction set brings. Ranges are tiles of the matrix, and rows of x.
///
/// The files behind a table are compiled with flags of their own, so whatever they share must have internal linkage:
/// the linker keeps one copy of an inline function, and it may be the one an older processor cannot run.
struct Kernels {
  void (*matmul_i2)(const TernaryMatmul&, size_t first_tile, size_t end_tile);
  void (*matmul_base3)(const TernaryMatmul&, size_t first_tile, size_t end_tile);
  void (*quantize)(const TokenRows&, size_t first_row, size_t end_row);
  void (*rms_norm)(const TokenRows&, size_t first_row, size_t end_row);
  uint64_t (*read)(const void* bytes, size_t count, int loop);
};

#define THRIFTY_MATMUL(isa)                                            \
  namespace isa {                                                      \
  void matmul_i2(const TernaryMatmul& m, size_t first, size_t end);    \
  void matmul_base3(const TernaryMatmul& m, size_t first, size_t end); \
  }
#define THRIFTY_QUANTIZE(isa)                                     \
  namespace isa {                                                 \
  void quantize(const TokenRows& rows, size_t first, size_t end); \
  void rms_norm(const TokenRows& rows, size_t first, size_t end); \
  }

THRIFTY_MATMUL(generic)
THRIFTY_MATMUL(neon)
THRIFTY_MATMUL(avx2)
THRIFTY_MATMUL(avx512)
namespace avx512_vbmi {
void matmul_base3(const TernaryMatmul& m, size_t first, size_t end);
}
THRIFTY_QUANTIZE(generic)
THRIFTY_QUANTIZE(neon)
THRIFTY_QUANTIZE(avx2)
THRIFTY_QUANTIZE(avx512)
namespace generic {
uint64_t read(const void* bytes, size_t count, int loop);
}
namespace avx512 {
uint64_t read(const void* bytes, size_t count, int loop);
}

#undef THRIFTY_MATMUL
#undef THRIFTY_QUANTIZE

}  // namespace thrifty
