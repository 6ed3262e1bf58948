#pragma once

#include "../prefetch.hpp"
#include "../vector/output.hpp"

namespace thrifty {
namespace {

constexpr int kFloatRows = 4;

/// Products of four rows of weights and kTokens rows of x; column j goes to lane j mod 16, and the lanes are folded.
template <class V, class T, int kTokens>
void dot_rows(const T* w, size_t cols, const float* x, size_t x_stride, float (*y)[kTileRows]) {
  typename V::F acc[kFloatRows][kTokens];
  for (auto& row : acc)
    for (auto& sums : row) sums = V::set(0.0f);
  for (size_t i = 0; i < cols; i += 16) {
    const size_t left = cols - i;
    typename V::F xs[kTokens];
    for (int t = 0; t < kTokens; ++t) xs[t] = load_some<V>(x + size_t(t) * x_stride + i, left);
    for (int r = 0; r < kFloatRows; ++r) {
      const T* at = w + size_t(r) * cols + i;
      prefetch(at + kPrefetch / 4 / sizeof(T));
      const auto ws = load_some<V>(at, left);
      for (int t = 0; t < kTokens; ++t) acc[r][t] = V::madd(ws, xs[t], acc[r][t]);
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < kFloatRows; ++r) y[t][r] = sum<V>(acc[r][t]);
}

/// One tile of sixteen rows; the last rows of a matrix go one by one.
template <class V, class T, int kTokens>
void dot_tile(const FloatMatmul& m, size_t tile, size_t token) {
  alignas(64) float y[kTokens][kTileRows] = {};
  const T* weights = static_cast<const T*>(m.weights);
  const float* x = m.x + token * m.x_stride;
  for (size_t r = 0; r < kTileRows; r += kFloatRows) {
    const size_t row = tile * kTileRows + r;
    if (row >= m.rows) break;
    auto* part = reinterpret_cast<float(*)[kTileRows]>(y[0] + r);
    if (row + kFloatRows <= m.rows) {
      dot_rows<V, T, kTokens>(weights + row * m.cols, m.cols, x, m.x_stride, part);
      continue;
    }
    for (size_t i = row; i < m.rows; ++i) {
      for (int t = 0; t < kTokens; ++t) {
        auto acc = V::set(0.0f);
        for (size_t j = 0; j < m.cols; j += 16) {
          const auto xs = load_some<V>(x + size_t(t) * m.x_stride + j, m.cols - j);
          acc = V::madd(load_some<V>(weights + i * m.cols + j, m.cols - j), xs, acc);
        }
        part[t][i - row] = sum<V>(acc);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) emit<V>(m.out, tile, token + size_t(t), V::load(y[t]));
}

template <class V, class T>
void dot_tiles(const FloatMatmul& m, size_t first, size_t end) {
  for (size_t tile = first; tile < end; ++tile) {
    size_t token = 0;
    for (; token + 4 <= m.n; token += 4) dot_tile<V, T, 4>(m, tile, token);
    for (; token < m.n; ++token) dot_tile<V, T, 1>(m, tile, token);
  }
}

template <class V>
void float_tiles(const FloatMatmul& m, size_t first, size_t end) {
  if (m.dtype == THRIFTY_BF16) return dot_tiles<V, Bfloat>(m, first, end);
  if (m.dtype == THRIFTY_F16) return dot_tiles<V, Half>(m, first, end);
  dot_tiles<V, float>(m, first, end);
}

}  // namespace
}  // namespace thrifty
