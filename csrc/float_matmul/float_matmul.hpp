#pragma once

#include "../gguf_blocks.hpp"
#include "../prefetch.hpp"
#include "../vector/output.hpp"

namespace thrifty {
namespace {

constexpr int kFloatRows = 4;

/// Weights in an element of a matrix as stored.
template <class T>
constexpr size_t kWeights = 1;
template <>
constexpr size_t kWeights<Q8Block> = kQ8Weights;

/// Sixteen columns of a row from column i on, of which `left` are there.
template <class V, class T>
typename V::F load_weights(const T* row, size_t i, size_t left) {
  return load_some<V>(row + i, left);
}
template <class V>
typename V::F load_weights(const Q8Block* row, size_t i, size_t) {
  const Q8Block& block = row[i / kQ8Weights];
  return V::mul(V::load(block.codes + i % kQ8Weights), V::set(widen(scale_of(block))));
}

/// Products of four rows of weights and kTokens rows of x; column j goes to lane j mod 16, and the lanes are folded.
template <class V, int kTokens, class T>
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

/// The same of blocks: sixteen scales are widened at once.
template <class V, int kTokens>
void dot_rows(const Q8Block* w, size_t cols, const float* x, size_t x_stride, float (*y)[kTileRows]) {
  const size_t blocks = cols / kQ8Weights;
  typename V::F acc[kFloatRows][kTokens];
  for (auto& row : acc)
    for (auto& sums : row) sums = V::set(0.0f);
  alignas(64) float scales[kFloatRows][16];
  for (size_t i = 0; i < blocks; ++i) {
    if (i % 16 == 0) {
      for (int r = 0; r < kFloatRows; ++r) {
        Half stored[16] = {};
        for (size_t s = 0; s < 16 && i + s < blocks; ++s) stored[s] = scale_of(w[size_t(r) * blocks + i + s]);
        V::store(scales[r], V::load(stored));
      }
    }
    typename V::F low[kTokens], high[kTokens];
    for (int t = 0; t < kTokens; ++t) {
      low[t] = V::load(x + size_t(t) * x_stride + i * kQ8Weights);
      high[t] = V::load(x + size_t(t) * x_stride + i * kQ8Weights + 16);
    }
    for (int r = 0; r < kFloatRows; ++r) {
      const Q8Block* block = w + size_t(r) * blocks + i;
      prefetch(block + kPrefetch / 4 / sizeof(Q8Block));
      const auto scale = V::set(scales[r][i % 16]);
      const auto first = V::mul(V::load(block->codes), scale), second = V::mul(V::load(block->codes + 16), scale);
      for (int t = 0; t < kTokens; ++t) acc[r][t] = V::madd(second, high[t], V::madd(first, low[t], acc[r][t]));
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
    const size_t width = m.cols / kWeights<T>;
    auto* part = reinterpret_cast<float (*)[kTileRows]>(y[0] + r);
    if (row + kFloatRows <= m.rows) {
      dot_rows<V, kTokens>(weights + row * width, m.cols, x, m.x_stride, part);
      continue;
    }
    for (size_t i = row; i < m.rows; ++i) {
      for (int t = 0; t < kTokens; ++t) {
        auto acc = V::set(0.0f);
        for (size_t j = 0; j < m.cols; j += 16) {
          const auto xs = load_some<V>(x + size_t(t) * m.x_stride + j, m.cols - j);
          acc = V::madd(load_weights<V>(weights + i * width, j, m.cols - j), xs, acc);
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
  if (m.dtype == THRIFTY_Q8_0) return dot_tiles<V, Q8Block>(m, first, end);
  dot_tiles<V, float>(m, first, end);
}

}  // namespace
}  // namespace thrifty
