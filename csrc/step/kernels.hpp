#pragma once

#include <cmath>
#include <type_traits>

#include "../attention/blocks.hpp"
#include "../dynamic_mask/dynamic_mask.hpp"
#include "../float_matmul/float_matmul.hpp"
#include "../glu/glu.hpp"
#include "../mlgru/mlgru.hpp"
#include "../rope_cache/rope_cache.hpp"
#include "../ssd/ssd.hpp"

/// The float kernels of a step for one instruction set; V is its vector class.
#define THRIFTY_STEP_KERNELS(isa, V)                                                                                  \
  namespace thrifty {                                                                                                 \
  namespace isa {                                                                                                     \
  void float_matmul(const FloatMatmul& m, size_t first, size_t end) { float_tiles<V>(m, first, end); }                \
  void rope_cache(const RopeCache& r, size_t first, size_t end) { rope_cache_items<V>(r, first, end); }               \
  void attend(const Attention& a, size_t row, size_t rows, size_t kv_head) { attend_many<V>(a, row, rows, kv_head); } \
  void attend_chunks(const Attention& a, size_t row, size_t kv_head, size_t first, size_t end) {                      \
    attend_parts<V>(a, row, kv_head, first, end);                                                                     \
  }                                                                                                                   \
  void merge_chunks(const Attention& a, size_t row, size_t kv_head) { merge_parts<V>(a, row, kv_head); }              \
  void glu(const float* gate, const float* up, int act, size_t count, float* y) {                                     \
    gate_up<V>(gate, up, act, count, y);                                                                              \
  }                                                                                                                   \
  void turn_heads(float* x, const float* cos, const float* sin, size_t d, size_t heads) {                             \
    for (size_t head = 0; head < heads; ++head) turn<V>(x + head * d, cos, sin, d / 2);                               \
  }                                                                                                                   \
  void dynamic_mask(const DynamicMask& m, size_t first, size_t end, size_t head) {                                    \
    dynamic_mask_rows<V>(m, first, end, head);                                                                        \
  }                                                                                                                   \
  void mlgru(const Mlgru& m, size_t first, size_t end) { mlgru_columns<V>(m, first, end); }                           \
  void ssd(const Ssd& s, size_t first, size_t end) { ssd_heads<V>(s, first, end); }                                   \
  }                                                                                                                   \
  }
