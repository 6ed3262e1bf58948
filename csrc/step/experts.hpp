#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "../kernels.hpp"

namespace thrifty {
namespace {

/// The experts of a layer, and how a row chooses among them.
struct RoutedExperts {
  size_t heads, k, keys, d;
  int dtype, activation;
  bool norm;
  const void* down;
  const void* up;
  const float* factors;  // of y, or null for ones
};

/// The softmax over each head's sums, best first, in float64; with `norm` over the sum of all of them.
inline void weigh_experts(const RoutedExperts& e, float* weights) {
  double all = 0;
  for (size_t head = 0; head < e.heads; ++head) {
    float* w = weights + head * e.k;
    const double most = w[0];
    double total = 0;
    for (size_t i = 0; i < e.k; ++i) total += std::exp(double(w[i]) - most);
    for (size_t i = 0; i < e.k; ++i) w[i] = float(std::exp(double(w[i]) - most) / total);
    for (size_t i = 0; i < e.k; ++i) all += double(w[i]);
  }
  for (size_t i = 0; e.norm && i < e.heads * e.k; ++i) weights[i] = float(double(weights[i]) / all);
}

/// y = factors y + (shared + sum of the row's experts). scores: [2, heads, keys].
inline void add_experts(const RoutedExperts& e, const Kernels& kernels, const float* x, const float* scores,
                        const float* shared, float* y, float* scratch) {
  const size_t count = e.heads * e.k;
  int64_t* numbers = reinterpret_cast<int64_t*>(scratch);
  float *weights = scratch + 2 * count, *hidden = weights + count, *mixed = hidden + count;
  for (size_t head = 0; head < e.heads; ++head) {
    const float* first = scores + head * e.keys;
    kernels.product_key_topk(first, first + e.heads * e.keys, e.keys, e.k, weights + head * e.k, numbers + head * e.k);
  }
  weigh_experts(e, weights);
  const ProductKeyExperts row{x, numbers, weights, e.down, e.up, e.dtype, e.activation, count, e.d, hidden, mixed};
  kernels.product_key_experts(row, 0, 1);
  for (size_t i = 0; i < e.d; ++i) {
    const float before = e.factors ? y[i] * e.factors[i] : y[i];
    y[i] = before + (shared[i] + mixed[i]);
  }
}

}  // namespace
}  // namespace thrifty
