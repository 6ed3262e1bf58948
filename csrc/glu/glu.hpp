#pragma once

#include "../vector/math.hpp"

namespace thrifty {
namespace {

/// y = act(gate) * up, in the order of operations of the epilogue that a product does it in.
template <class V>
void gate_up(const float* gate, const float* up, int activation, size_t count, float* y) {
  for (size_t i = 0; i < count; i += 16) {
    auto v = activate<V>(activation, load_some<V>(gate + i, count - i));
    if (up) v = V::mul(v, load_some<V>(up + i, count - i));
    store_some<V>(y + i, count - i, v);
  }
}

}  // namespace
}  // namespace thrifty
