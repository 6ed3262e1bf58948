#pragma once

#include <cmath>
#include <cstddef>

#include "../softplus.hpp"

namespace thrifty {
namespace {

/// exp(A softplus(w x + bias)): what a key is worth to a dynamic mask. In eight partial sums, so that compilers keep
/// them in registers side by side.
inline float key_score(const float* x, const float* w, size_t width, double bias, double A) {
  constexpr size_t lanes = 8;
  double sums[lanes] = {};
  size_t i = 0;
  for (; i + lanes <= width; i += lanes) {
    for (size_t j = 0; j < lanes; ++j) sums[j] += double(x[i + j]) * double(w[i + j]);
  }
  for (; i < width; ++i) sums[0] += double(x[i]) * double(w[i]);
  double dt = bias;
  for (double sum : sums) dt += sum;
  return float(std::exp(A * softplus(dt)));
}

}  // namespace
}  // namespace thrifty
