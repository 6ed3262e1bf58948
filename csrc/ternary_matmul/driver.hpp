#pragma once

#include <cstring>

#include "../kernels.hpp"
#include "../vector/output.hpp"

namespace thrifty {
namespace {

/// Rows of x whose sums are held at once. Weights are streamed once per chunk, and a chunk of x stays in the cache.
constexpr size_t kChunkRows = 64;

inline int32_t load_dword(const int8_t* x) {
  int32_t word;
  std::memcpy(&word, x, 4);
  return word;
}

template <class V>
typename V::F scale_of(const TernaryMatmul& m, size_t tile) {
  const size_t first = tile * kTileRows;
  return m.scale_per_row ? load_some<V>(m.w_scale + first, m.rows - first) : V::set(*m.w_scale);
}

/// Stores y of one tile and one row of x, in the order of operations that the spec fixes. acc: the exact products.
template <class V>
void finish_tile(const TernaryMatmul& m, size_t tile, size_t token, typename V::F acc) {
  emit<V>(m.out, tile, token, V::mul(acc, V::mul(V::set(m.x_scales[token]), scale_of<V>(m, tile))));
}

/// The same from an array, which is changed: `products` are sums of unsigned digits times x.
template <class V>
void store_tile(const TernaryMatmul& m, size_t tile, size_t token, int32_t* products, int32_t sum) {
  for (size_t lane = 0; lane < kTileRows; ++lane) products[lane] -= sum;
  finish_tile<V>(m, tile, token, V::load(products));
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
/// block of weights once for the group. acc = sum(u * x) - offset * sum(x) with u = code + offset, which is unsigned as
/// the byte products want it.
template <class Kernel>
void run_tiles(const TernaryMatmul& m, size_t first, size_t end) {
  int32_t sums[kChunkRows];
  for (size_t token = 0; token < m.n; token += kChunkRows) {
    const size_t count = m.n - token < kChunkRows ? m.n - token : kChunkRows;
    for (size_t i = 0; i < count; ++i) {
      sums[i] = Kernel::kOffset * Kernel::row_sum(m.x + (token + i) * m.x_stride, m.blocks * Kernel::kBlockCols);
    }
    // Several tiles at once lie apart, each at the head of a linear stream.
    size_t step = (end - first) / Kernel::kTiles;
    // A gate comes before its up, which the tile after it is.
    if (m.out.epilogue == THRIFTY_GATE_UP) step -= step % 2;
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
