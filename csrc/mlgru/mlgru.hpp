#pragma once

#include "../kernels.hpp"
#include "../vector/math.hpp"

namespace thrifty {
namespace {

/// h = f h + (1 - f) c, each operation rounded, as src/thrifty/spec/mlgru.py has it; y = g h, or g silu(h).
template <class V>
void mlgru_columns(const Mlgru& m, size_t first, size_t end) {
  for (size_t column = 16 * first; column < 16 * end && column < m.d; column += 16) {
    const size_t count = m.d - column;
    for (size_t row = 0; row < m.rows; ++row) {
      const thrifty_slot& sequence = m.batch->caches[m.batch->slots[row]];
      float* state = reinterpret_cast<float*>(static_cast<char*>(sequence.states) + m.at) + column;
      const size_t at = row * m.x_stride + column;
      auto f = load_some<V>(m.f + at, count);
      const auto c = load_some<V>(m.c + at, count);
      if (m.bounds) {
        const auto bound = load_some<V>(m.bounds + column, count);
        f = V::add(bound, V::mul(V::sub(V::set(1.0f), bound), f));
      }
      auto h = m.batch->positions[row] == 0 ? V::set(0.0f) : load_some<V>(state, count);
      h = V::add(V::mul(f, h), V::mul(V::sub(V::set(1.0f), f), c));
      store_some<V>(state, count, h);
      if (m.silu) h = activate<V>(THRIFTY_SILU, h);
      if (m.g) h = V::mul(load_some<V>(m.g + at, count), h);
      store_some<V>(m.y + row * m.y_stride + column, count, h);
    }
  }
}

}  // namespace
}  // namespace thrifty
