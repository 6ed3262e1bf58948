#pragma once

#include <cstring>

#include "../kernels.hpp"

namespace thrifty {
namespace {

/// Rows of x whose sums are held at once. Weights are streamed once per chunk, and a chunk of x stays in the cache.
constexpr size_t kChunkRows = 64;

inline int32_t load_dword(const int8_t* x) {
  int32_t word;
  std::memcpy(&word, x, 4);
  return word;
}

/// y of one row and lane, in the order of operations that the spec fixes.
inline float finish(const TernaryMatmul& m, size_t token, size_t row, int32_t acc) {
  const float scale = m.x_scales[token] * m.w_scale[m.scale_per_row ? row : 0];
  const float y = float(acc) * scale;
  return m.bias ? y + m.bias[row] : y;
}

/// Stores y of one tile and one row of x; `products` are sums of unsigned digits (code + 1) times x.
inline void store_tile(const TernaryMatmul& m, size_t tile, size_t token, const int32_t* products, int32_t sum) {
  const size_t first = tile * kTileRows;
  const size_t count = m.rows - first < kTileRows ? m.rows - first : kTileRows;
  for (size_t lane = 0; lane < count; ++lane) {
    m.y[token * m.rows + first + lane] = finish(m, token, first + lane, products[lane] - sum);
  }
}

template <class Kernel, int kTiles, int kGroup>
void run_group(const TernaryMatmul& m, size_t tile, size_t step, size_t token, size_t count, const int32_t* sums) {
  for (; count >= size_t{kGroup}; count -= kGroup, token += kGroup, sums += kGroup) {
    Kernel::template product<kTiles, kGroup>(m, tile, step, token, sums);
  }
  if constexpr (kGroup > 1) {
    if (count > 0) run_group<Kernel, kTiles, kGroup / 2>(m, tile, step, token, count, sums);
  }
}

/// y for a run of tiles and every row of x. A kernel gives its block's columns, the most tiles and rows of x that it
/// takes at once, `row_sum`, and `product<tiles, group>`, which computes and stores tiles `step` apart; it decodes a
/// block of weights once for the group. acc = sum(u * x) - sum(x) with u = code + 1, which is unsigned as the byte
/// products want it.
template <class Kernel>
void run_tiles(const TernaryMatmul& m, size_t first, size_t end) {
  int32_t sums[kChunkRows];
  for (size_t token = 0; token < m.n; token += kChunkRows) {
    const size_t count = m.n - token < kChunkRows ? m.n - token : kChunkRows;
    for (size_t i = 0; i < count; ++i) {
      sums[i] = Kernel::row_sum(m.x + (token + i) * m.x_stride, m.blocks * Kernel::kBlockCols);
    }
    // Several tiles at once lie apart, each at the head of a linear stream.
    const size_t step = (end - first) / Kernel::kTiles;
    for (size_t tile = first; tile < first + step; ++tile) {
      run_group<Kernel, Kernel::kTiles, Kernel::kGroup>(m, tile, step, token, count, sums);
    }
    for (size_t tile = first + step * Kernel::kTiles; tile < end; ++tile) {
      run_group<Kernel, 1, Kernel::kGroup>(m, tile, 0, token, count, sums);
    }
  }
}

}  // namespace
}  // namespace thrifty
