#pragma once

#include <cmath>

#include "../kernels.hpp"
#include "../softplus.hpp"
#include "../step/cache.hpp"
#include "../vector/math.hpp"

namespace thrifty {
namespace {

/// h = exp(A s) h + s x B^T, y = h C, s = softplus(dt), rows in order. A state is [n, p]: lanes lie along p, so that no
/// sum crosses them.
template <class V>
void ssd_heads(const Ssd& m, size_t first, size_t end) {
  const size_t stride = up_to(m.p, 16);
  for (size_t head = first; head < end; ++head) {
    const size_t group = head / (m.heads / m.groups);
    for (size_t row = 0; row < m.rows; ++row) {
      const thrifty_slot& sequence = m.batch->caches[m.batch->slots[row]];
      float* state = reinterpret_cast<float*>(static_cast<char*>(sequence.states) + m.at) + head * m.n * stride;
      const bool begins = m.batch->positions[row] == 0;
      const float step = float(softplus(double(m.dt[row * m.dt_stride + head])));
      const auto kept = V::set(float(std::exp(double(m.a[head]) * double(step))));
      const float* x = m.x + row * m.x_stride + head * m.p;
      const float *b = m.b + row * m.x_stride + group * m.n, *c = m.c + row * m.x_stride + group * m.n;
      for (size_t i = 0; i < m.p; i += 16) {
        const auto u = V::mul(V::set(step), load_some<V>(x + i, m.p - i));
        auto y = V::set(0.0f);
        for (size_t j = 0; j < m.n; ++j) {
          float* at = state + j * stride + i;
          const auto before = begins ? V::set(0.0f) : V::mul(kept, V::load(at));
          const auto h = V::madd(V::set(b[j]), u, before);
          V::store(at, h);
          y = V::madd(V::set(c[j]), h, y);
        }
        store_some<V>(m.y + row * m.y_stride + head * m.p + i, m.p - i, y);
      }
    }
  }
}

}  // namespace
}  // namespace thrifty
