#include <algorithm>
#include <cstring>

#include "cache.hpp"

namespace thrifty {
namespace {

template <bool kInto, class T>
void move(T* cache, T* plain, size_t count) {
  if (kInto) {
    std::copy(plain, plain + count, cache);
  } else {
    std::copy(cache, cache + count, plain);
  }
}

/// Positions of one kv head: to the plain arrays k, v [count, d], or from them into the cache.
template <bool kInto, class T>
void copy_head(const HeadCache& cache, size_t d, size_t count, T* k, T* v) {
  T *keys = reinterpret_cast<T*>(cache.k), *values = reinterpret_cast<T*>(cache.v);
  for (size_t position = 0; position < count; ++position) {
    T* column = keys + position / 16 * d * 16 + position % 16;
    for (size_t i = 0; i < d; ++i) move<kInto>(column + i * 16, k + position * d + i, 1);
    T* row = values + position * up_to(d, 16);
    move<kInto>(row, v + position * d, d);
    if (kInto) std::fill(row + d, row + up_to(d, 16), T{});
  }
}

/// The same for codes, whose bytes in the cache are 128 more.
template <bool kInto>
void copy_codes(const HeadCache& cache, size_t d, size_t count, uint8_t* k, uint8_t* v) {
  const auto copy = [](uint8_t* byte, uint8_t* code) {
    if (kInto) {
      *byte = uint8_t(*code + 128);
    } else {
      *code = uint8_t(*byte - 128);
    }
  };
  for (size_t position = 0; position < count; ++position) {
    for (size_t i = 0; i < d; ++i) {
      copy(cache.key_byte(d, position, i), k + position * d + i);
      copy(cache.value_byte(d, position, i), v + position * d + i);
    }
  }
}

template <bool kInto>
void copy_cache(Heads h, size_t layers, const thrifty_slot& slot, size_t count, char* k, char* v, float* k_scales,
                float* v_scales) {
  const size_t head_bytes = count * h.head_dim * element_bytes(h.dtype);
  for (h.layer = 0; h.layer < layers; ++h.layer) {
    for (size_t kv_head = 0; kv_head < h.kv_heads; ++kv_head, k += head_bytes, v += head_bytes) {
      const HeadCache cache(h, slot, kv_head);
      if (h.dtype == THRIFTY_F32) {
        copy_head<kInto>(cache, h.head_dim, count, reinterpret_cast<float*>(k), reinterpret_cast<float*>(v));
        continue;
      }
      if (h.dtype == THRIFTY_F16) {
        copy_head<kInto>(cache, h.head_dim, count, reinterpret_cast<uint16_t*>(k), reinterpret_cast<uint16_t*>(v));
        continue;
      }
      copy_codes<kInto>(cache, h.head_dim, count, reinterpret_cast<uint8_t*>(k), reinterpret_cast<uint8_t*>(v));
      move<kInto>(cache.k_scales, k_scales, count);
      move<kInto>(cache.v_scales, v_scales, count);
      k_scales += count;
      v_scales += count;
    }
  }
}

}  // namespace
}  // namespace thrifty

using namespace thrifty;

int thrifty_cache_copy(int dtype, int64_t layers, int64_t kv_heads, int64_t head_dim, const thrifty_slot* cache,
                       int64_t count, void* k, void* v, float* k_scales, float* v_scales, int into) {
  if (!cache || !cache->base || !k || !v || count < 0 || count > cache->capacity) return THRIFTY_BAD_ARGUMENT;
  if (thrifty_cache_size(dtype, layers, kv_heads, head_dim, cache->capacity) == 0) return THRIFTY_BAD_ARGUMENT;
  if (dtype == THRIFTY_INT8 && (!k_scales || !v_scales)) return THRIFTY_BAD_ARGUMENT;
  const Heads h{size_t(kv_heads), size_t(kv_heads), size_t(head_dim), 0, dtype};
  const auto copy = into ? copy_cache<true> : copy_cache<false>;
  copy(h, size_t(layers), *cache, size_t(count), static_cast<char*>(k), static_cast<char*>(v), k_scales, v_scales);
  return THRIFTY_OK;
}
