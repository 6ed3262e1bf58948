#pragma once

#include "../kernels.hpp"

namespace thrifty {
namespace {

constexpr size_t up_to(size_t count, size_t multiple) { return (count + multiple - 1) / multiple * multiple; }

constexpr size_t element_bytes(int dtype) { return dtype == THRIFTY_F32 ? 4 : dtype == THRIFTY_INT8 ? 1 : 2; }

/// Query heads of a kv head.
inline size_t group_of(const Heads& h) { return h.heads / h.kv_heads; }

/// Keys and values of one kv head of a layer of a sequence. Keys lie in blocks of sixteen positions [C / 16, d, 16], so
/// that scores of a block need no sum across lanes; values by position [C, d padded to 16]. Scales of int8 follow.
struct HeadCache {
  char* k;
  char* v;
  float* k_scales;
  float* v_scales;
  const float* bias = nullptr;  // of each position, added to its score

  static size_t layer_bytes(const Heads& h, size_t capacity) {
    const size_t elements = capacity * (h.head_dim + up_to(h.head_dim, 16));
    return h.kv_heads * (elements * element_bytes(h.dtype) + (h.dtype == THRIFTY_INT8 ? 8 * capacity : 0));
  }

  HeadCache(const Heads& h, const thrifty_slot& slot, size_t kv_head) {
    const size_t capacity = size_t(slot.capacity), unit = element_bytes(h.dtype);
    const size_t k_bytes = capacity * h.head_dim * unit, v_bytes = capacity * up_to(h.head_dim, 16) * unit;
    char* layer = static_cast<char*>(slot.base) + h.layer * layer_bytes(h, capacity);
    k = layer + kv_head * k_bytes;
    v = layer + h.kv_heads * k_bytes + kv_head * v_bytes;
    k_scales = reinterpret_cast<float*>(layer + h.kv_heads * (k_bytes + v_bytes)) + kv_head * capacity;
    v_scales = k_scales + h.kv_heads * capacity;
  }
};

}  // namespace
}  // namespace thrifty
