#pragma once

#include "../kernels.hpp"

namespace thrifty {
namespace {

constexpr size_t up_to(size_t count, size_t multiple) { return (count + multiple - 1) / multiple * multiple; }

constexpr size_t element_bytes(int dtype) { return dtype == THRIFTY_F32 ? 4 : dtype == THRIFTY_INT8 ? 1 : 2; }

/// Query heads of a kv head.
inline size_t group_of(const Heads& h) { return h.heads / h.kv_heads; }

/// Keys and values of one kv head of a layer of a sequence. Keys lie in blocks of sixteen positions [C / 16, d, 16], so
/// that scores of a block need no sum across lanes; values by position [C, d padded to 16].
///
/// Of int8, four bytes that are summed over lie together: keys [C / 16, d / 4, 16, 4], d padded to 4, values
/// [C / 4, d padded to 16, 4], each a code plus 128, as the byte products of x86 want one operand. Scales follow.
struct HeadCache {
  char* k;
  char* v;
  float* k_scales;
  float* v_scales;
  const float* bias = nullptr;  // of each position, added to its score

  const float* bias_from(size_t position) const { return bias ? bias + position : nullptr; }

  /// Elements of a position's key.
  static size_t key_of(const Heads& h) { return h.dtype == THRIFTY_INT8 ? up_to(h.head_dim, 4) : h.head_dim; }

  static size_t layer_bytes(const Heads& h, size_t capacity) {
    const size_t elements = capacity * (key_of(h) + up_to(h.head_dim, 16));
    return h.kv_heads * (elements * element_bytes(h.dtype) + (h.dtype == THRIFTY_INT8 ? 8 * capacity : 0));
  }

  HeadCache(const Heads& h, const thrifty_slot& slot, size_t kv_head) {
    const size_t capacity = size_t(slot.capacity), unit = element_bytes(h.dtype);
    const size_t k_bytes = capacity * key_of(h) * unit, v_bytes = capacity * up_to(h.head_dim, 16) * unit;
    char* layer = static_cast<char*>(slot.base) + h.layer * layer_bytes(h, capacity);
    k = layer + kv_head * k_bytes;
    v = layer + h.kv_heads * k_bytes + kv_head * v_bytes;
    k_scales = reinterpret_cast<float*>(layer + h.kv_heads * (k_bytes + v_bytes)) + kv_head * capacity;
    v_scales = k_scales + h.kv_heads * capacity;
  }

  /// Bytes of an int8 cache, d features a position.
  uint8_t* key_byte(size_t d, size_t position, size_t i) const {
    return reinterpret_cast<uint8_t*>(k) + position / 16 * up_to(d, 4) * 16 + i / 4 * 64 + position % 16 * 4 + i % 4;
  }
  uint8_t* value_byte(size_t d, size_t position, size_t i) const {
    return reinterpret_cast<uint8_t*>(v) + position / 4 * up_to(d, 16) * 4 + i * 4 + position % 4;
  }
};

}  // namespace
}  // namespace thrifty
