#pragma once

#include <cstddef>
#include <cstring>

#include "thrifty.h"

namespace thrifty {
namespace {

/// The sixteen lanes folded in halves, the one order in which lanes are ever added.
template <class V>
float sum(typename V::F v) {
  alignas(64) float lane[16];
  V::store(lane, v);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

/// The largest lane; a NaN wins.
template <class V>
float largest(typename V::F v) {
  alignas(64) float lane[16];
  V::store(lane, v);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      const float a = lane[i], b = lane[i + half];
      lane[i] = a >= b || a != a ? a : b;
    }
  }
  return lane[0];
}

/// Elements from `from` on, `count` of them, zero in the other lanes.
template <class V, class T>
typename V::F load_some(const T* from, size_t count) {
  if (count >= 16) return V::load(from);
  T part[16];
  std::memset(part, 0, sizeof part);
  std::memcpy(part, from, count * sizeof(T));
  return V::load(part);
}

template <class V>
void store_some(float* to, size_t count, typename V::F v) {
  if (count >= 16) return V::store(to, v);
  alignas(64) float lane[16];
  V::store(lane, v);
  std::memcpy(to, lane, count * 4);
}

/// 127 / largest |x|, and the scale that undoes it.
template <class V>
float inverse_scale(const float* x, size_t d, float* scale) {
  auto most = V::set(0.0f);
  for (size_t i = 0; i < d; i += 16) most = V::max(most, V::abs(load_some<V>(x + i, d - i)));
  const float found = largest<V>(most), a = found < 1e-5f ? 1e-5f : found;
  *scale = a / 127.0f;
  return 127.0f / a;
}

/// e^x for x <= 0, 1.2e-38 below -87; relative error 1e-7. One text for all instruction sets: x = n ln 2 + r, and the
/// series of e^r to the sixth power, |r| <= ln 2 / 2.
template <class V>
typename V::F exp_negative(typename V::F x) {
  x = V::max(V::set(-87.0f), x);
  const auto n = V::round(V::mul(x, V::set(1.44269504f)));
  // ln 2 in two parts, the first of few bits, so that n times it is exact.
  const auto r = V::madd(n, V::set(2.12194440e-4f), V::madd(n, V::set(-0.693359375f), x));
  auto p = V::set(1.0f / 720);
  p = V::madd(p, r, V::set(1.0f / 120));
  p = V::madd(p, r, V::set(1.0f / 24));
  p = V::madd(p, r, V::set(1.0f / 6));
  p = V::madd(p, r, V::set(0.5f));
  p = V::madd(p, V::mul(r, r), V::add(r, V::set(1.0f)));
  return V::scale(p, n);
}

template <class V>
typename V::F negate(typename V::F x) {
  return V::sub(V::set(0.0f), x);
}

/// x sigmoid(x).
template <class V>
typename V::F silu(typename V::F x) {
  const auto e = exp_negative<V>(negate<V>(V::abs(x)));
  const auto one = V::set(1.0f);
  return V::div(V::mul(x, V::where_negative(x, e, one)), V::add(one, e));
}

template <class V>
typename V::F sigmoid(typename V::F x) {
  const auto e = exp_negative<V>(negate<V>(V::abs(x)));
  const auto one = V::set(1.0f);
  return V::div(V::where_negative(x, e, one), V::add(one, e));
}

/// x Phi(x) through erf: Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
template <class V>
typename V::F gelu(typename V::F x) {
  const auto one = V::set(1.0f), z = V::mul(V::abs(x), V::set(0.70710678f));
  const auto t = V::div(one, V::madd(z, V::set(0.3275911f), one));
  auto p = V::set(1.061405429f);
  p = V::madd(p, t, V::set(-1.453152027f));
  p = V::madd(p, t, V::set(1.421413741f));
  p = V::madd(p, t, V::set(-0.284496736f));
  p = V::madd(p, t, V::set(0.254829592f));
  const auto tail = V::mul(V::mul(p, t), exp_negative<V>(negate<V>(V::mul(z, z))));  // 1 - erf(z)
  const auto twice = V::where_negative(x, tail, V::sub(V::set(2.0f), tail));
  return V::mul(V::mul(x, V::set(0.5f)), twice);
}

template <class V>
typename V::F gelu_tanh(typename V::F x) {
  const auto one = V::set(1.0f);
  const auto cubic = V::madd(V::mul(V::mul(x, x), x), V::set(0.044715f), x);
  const auto u = V::mul(cubic, V::set(0.79788456f));
  const auto e = exp_negative<V>(V::mul(V::abs(u), V::set(-2.0f)));
  // 1 + tanh(u) = 2 / (1 + e) for u >= 0, 2 e / (1 + e) below.
  const auto twice = V::div(V::mul(V::set(2.0f), V::where_negative(u, e, one)), V::add(one, e));
  return V::mul(V::mul(x, V::set(0.5f)), twice);
}

template <class V>
typename V::F activate(int activation, typename V::F x) {
  switch (activation) {
    case THRIFTY_SILU: return silu<V>(x);
    case THRIFTY_GELU: return gelu<V>(x);
    case THRIFTY_GELU_TANH: return gelu_tanh<V>(x);
    case THRIFTY_SIGMOID: return sigmoid<V>(x);
    default: break;
  }
  const auto positive = V::max(V::set(0.0f), x);
  return activation == THRIFTY_RELU2 ? V::mul(positive, positive) : positive;
}

}  // namespace
}  // namespace thrifty
