#pragma once

#include "../step/cache.hpp"
#include "../vector/math.hpp"

namespace thrifty {
namespace {

/// (a, b) -> (a cos - b sin, b cos + a sin) for the halves a and b of a head, in place.
template <class V>
void turn(float* x, const float* cos, const float* sin, size_t half) {
  for (size_t i = 0; i < half; i += 16) {
    const size_t count = half - i;
    const auto a = load_some<V>(x + i, count), b = load_some<V>(x + half + i, count);
    const auto c = load_some<V>(cos + i, count), s = load_some<V>(sin + i, count);
    store_some<V>(x + i, count, V::sub(V::mul(a, c), V::mul(b, s)));
    store_some<V>(x + half + i, count, V::add(V::mul(b, c), V::mul(a, s)));
  }
}

/// Writes k and v [d] of a position; T is the cache's type.
template <class V, class T>
void keep(const HeadCache& cache, size_t d, size_t position, const float* k, const float* v) {
  T* keys = reinterpret_cast<T*>(cache.k) + position / 16 * d * 16 + position % 16;
  T* values = reinterpret_cast<T*>(cache.v) + position * up_to(d, 16);
  for (size_t i = 0; i < d; i += 16) {
    T part[16];
    V::store(part, load_some<V>(k + i, d - i));
    for (size_t j = 0; j < 16 && i + j < d; ++j) keys[(i + j) * 16] = part[j];
    V::store(values + i, load_some<V>(v + i, d - i));
  }
}

template <class V>
void keep_int8(const HeadCache& cache, size_t d, size_t position, const float* k, const float* v) {
  const auto k_factor = V::set(inverse_scale<V>(k, d, cache.k_scales + position));
  const auto v_factor = V::set(inverse_scale<V>(v, d, cache.v_scales + position));
  for (size_t i = 0; i < d; i += 16) {
    int8_t part[16];
    V::store(part, V::mul(load_some<V>(k + i, d - i), k_factor));
    for (size_t j = 0; j < 16 && i + j < d; ++j) *cache.key_byte(d, position, i + j) = uint8_t(part[j] + 128);
    V::store(part, V::mul(load_some<V>(v + i, d - i), v_factor));
    for (size_t j = 0; j < 16; ++j) *cache.value_byte(d, position, i + j) = uint8_t(part[j] + 128);
  }
}

template <class V>
void rope_cache_items(const RopeCache& r, size_t first, size_t end) {
  const Heads& h = r.shape;
  const size_t d = h.head_dim, half = d / 2;
  for (size_t item = first; item < end; ++item) {
    const size_t row = item / h.kv_heads, kv_head = item % h.kv_heads;
    const size_t position = size_t(r.batch->positions[row]);
    const float *cos = r.cos + position * half, *sin = r.sin + position * half;
    float* qkv = r.qkv + row * r.stride;
    for (size_t head = kv_head * group_of(h); head < (kv_head + 1) * group_of(h); ++head) {
      turn<V>(qkv + head * d, cos, sin, half);
    }
    float *k = qkv + r.k_offset + kv_head * d, *v = qkv + r.v_offset + kv_head * d;
    turn<V>(k, cos, sin, half);
    const HeadCache cache(h, r.batch->caches[r.batch->slots[row]], kv_head);
    if (h.dtype == THRIFTY_INT8) {
      keep_int8<V>(cache, d, position, k, v);
    } else if (h.dtype == THRIFTY_F16) {
      keep<V, Half>(cache, d, position, k, v);
    } else {
      keep<V, float>(cache, d, position, k, v);
    }
  }
}

}  // namespace
}  // namespace thrifty
