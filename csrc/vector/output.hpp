#pragma once

#include "../kernels.hpp"
#include "math.hpp"

namespace thrifty {
namespace {

/// Takes the values v of one tile and row of x where they go. A gate tile leaves act(v) in y, and the up tile after it,
/// which the same thread computes, multiplies it.
template <class V>
void emit(const Output& o, size_t tile, size_t token, typename V::F v) {
  const bool pairs = o.epilogue == THRIFTY_GATE_UP;
  const size_t first = (pairs ? tile / 2 : tile) * kTileRows;
  if (first >= o.cols) return;
  const size_t count = o.cols - first;
  float* y = o.y + token * o.stride + first;
  if (o.bias) v = V::add(v, load_some<V>(o.bias + tile * kTileRows, pairs ? kTileRows : count));
  if (o.epilogue == THRIFTY_ACT || (pairs && tile % 2 == 0)) {
    v = activate<V>(o.activation, v);
  } else if (o.epilogue == THRIFTY_ADD) {
    auto before = load_some<V>(y, count);
    if (o.factors) before = V::mul(before, load_some<V>(o.factors + first, count));
    v = V::add(before, v);
  } else if (pairs || o.epilogue == THRIFTY_MULTIPLY) {
    v = V::mul(load_some<V>(y, count), v);
  }
  store_some<V>(y, count, v);
}

/// Where the tile of a row of x, or the pair of its tile, goes.
inline float* place_of(const Output& o, size_t tile, size_t token) {
  return o.y + token * o.stride + (o.epilogue == THRIFTY_GATE_UP ? tile / 2 : tile) * kTileRows;
}

/// A gate and its up, the tile after it, at once.
template <class V>
void emit_pair(const Output& o, size_t tile, size_t token, typename V::F gate, typename V::F up) {
  const size_t first = tile / 2 * kTileRows;
  if (first >= o.cols) return;
  if (o.bias) {
    gate = V::add(gate, V::load(o.bias + tile * kTileRows));
    up = V::add(up, V::load(o.bias + (tile + 1) * kTileRows));
  }
  store_some<V>(place_of(o, tile, token), o.cols - first, V::mul(activate<V>(o.activation, gate), up));
}

}  // namespace
}  // namespace thrifty
