#pragma once

#include "../formats.hpp"
#include "../gguf_blocks.hpp"
#include "../kernels.hpp"
#include "thrifty.h"

namespace thrifty {
namespace {

bool valid_epilogue(const thrifty_op& op) { return op.n[6] <= THRIFTY_MULTIPLY && op.n[7] <= THRIFTY_SIGMOID; }

bool valid_cache(int64_t dtype, int64_t head_dim) {
  return dtype == THRIFTY_F32 || dtype == THRIFTY_F16 || (dtype == THRIFTY_INT8 && head_dim <= int64_t{kMostInt8Dim});
}

/// Rows of floats as a table or matrix stores them.
bool valid_floats(int64_t dtype, int64_t cols) {
  return dtype <= THRIFTY_F16 || (dtype == THRIFTY_Q8_0 && cols % int64_t{kQ8Weights} == 0);
}

bool valid_heads(const thrifty_op& op) {
  return op.n[0] > 0 && op.n[1] > 0 && op.n[0] % op.n[1] == 0 && op.n[2] > 0 && valid_cache(op.n[4], op.n[2]) &&
         op.p[0] && op.p[1] && op.p[2];
}

bool all_given(const thrifty_op& op, int count) {
  for (int i = 0; i < count; ++i) {
    if (!op.p[i]) return false;
  }
  return true;
}

bool valid_state(int64_t at) { return at % 64 == 0; }

bool valid_mask(const thrifty_op& op) {
  return op.n[1] > 0 && op.n[3] > 0 && op.n[0] % op.n[3] == 0 && op.n[3] % op.n[1] == 0 && op.n[2] > 0 &&
         valid_cache(op.n[5], op.n[2]) && valid_state(op.n[8]) && op.p[1] && op.p[2] && op.p[3] && !op.p[0] == !op.p[4];
}

bool valid_experts(const thrifty_op& op) {
  const int64_t heads = op.n[0], k = op.n[1], n = op.n[2], d = op.n[3];
  const bool sizes = heads > 0 && k > 0 && k <= THRIFTY_MOST_CHOSEN && n > 0 && n <= 65536 && k <= n * n && d > 0;
  return sizes && op.n[4] <= THRIFTY_F16 && op.n[5] <= THRIFTY_SIGMOID && op.n[8] % 2 == 0 &&
         op.n[8] >= 4 * heads * k + d && all_given(op, 6) && op.p[7];
}

bool keeps_states(const thrifty_op& op) {
  return op.code == THRIFTY_OP_DYNAMIC_MASK || op.code == THRIFTY_OP_MLGRU || op.code == THRIFTY_OP_SSD;
}

/// Only these ops may go on with fewer rows, and only norms choose them.
bool valid_flags(const thrifty_op& op) {
  const bool norm = op.code == THRIFTY_OP_QUANTIZE || op.code == THRIFTY_OP_RMS_NORM;
  const bool product = op.code == THRIFTY_OP_MATMUL || op.code == THRIFTY_OP_FLOAT_MATMUL;
  if ((op.flags & THRIFTY_GATHER) && !(norm && (op.flags & THRIFTY_OUTPUTS))) return false;
  return !(op.flags & THRIFTY_OUTPUTS) || norm || product;
}

bool valid_op(const thrifty_op& op) {
  if (!valid_flags(op)) return false;
  for (int64_t n : op.n) {
    if (n < 0) return false;
  }
  switch (op.code) {
    case THRIFTY_OP_EMBED: return op.p[0] && op.p[1] && valid_floats(op.n[2], op.n[1]);
    case THRIFTY_OP_QUANTIZE: return op.p[0] && op.p[2] && op.p[3] && op.n[2] >= op.n[0] && op.n[0] > 0;
    case THRIFTY_OP_RMS_NORM: return op.p[0] && op.p[2] && op.n[0] > 0;
    case THRIFTY_OP_MATMUL:
      return op.n[0] < THRIFTY_FORMAT_COUNT && op.n[0] != THRIFTY_ROW_BLOCK && valid_shape(op.n[1], op.n[2]) &&
             op.n[2] <= kFormats[op.n[0]].most_cols &&
             op.n[3] >= int64_t(round_up(size_t(op.n[2]), kFormats[op.n[0]].col_multiple)) && valid_epilogue(op) &&
             op.p[0] && op.p[1] && op.p[3] && op.p[4] && op.p[5];
    case THRIFTY_OP_FLOAT_MATMUL:
      return valid_floats(op.n[0], op.n[2]) && valid_epilogue(op) && op.p[0] && op.p[3] && op.p[5];
    case THRIFTY_OP_ROPE_CACHE: return valid_heads(op) && op.n[2] % 2 == 0;
    case THRIFTY_OP_ATTENTION: return valid_heads(op);
    case THRIFTY_OP_HEADS: return op.p[0] && op.n[2] > 0 && !op.p[1] == !op.p[2] && (!op.p[1] || op.n[2] % 2 == 0);
    case THRIFTY_OP_KEY_SCORES: return op.n[0] > 0 && op.n[1] > 0 && op.p[0] && op.p[1] && op.p[2] && op.p[4];
    case THRIFTY_OP_DYNAMIC_MASK: return valid_mask(op);
    case THRIFTY_OP_MLGRU: return op.n[0] > 0 && valid_state(op.n[3]) && op.p[0] && op.p[1] && op.p[3];
    case THRIFTY_OP_SSD:
      return op.n[1] > 0 && op.n[0] % op.n[1] == 0 && op.n[2] > 0 && op.n[3] > 0 && valid_state(op.n[7]) &&
             all_given(op, 6);
    case THRIFTY_OP_EXPERTS: return valid_experts(op);
    default: return false;
  }
}

// A private op is one of a pair: what makes the copy, and the product that reads it.
bool valid_pairs(const thrifty_op* ops, int64_t n_ops) {
  constexpr int32_t common = THRIFTY_PRIVATE | THRIFTY_OUTPUTS;
  for (int64_t i = 0; i < n_ops; ++i) {
    if (!(ops[i].flags & THRIFTY_PRIVATE)) continue;
    const bool codes = ops[i].code == THRIFTY_OP_QUANTIZE;
    if (!codes && ops[i].code != THRIFTY_OP_RMS_NORM) return false;
    const thrifty_op* product = &ops[++i];
    if (i == n_ops || product->code != (codes ? THRIFTY_OP_MATMUL : THRIFTY_OP_FLOAT_MATMUL)) return false;
    if ((product->flags & common) != (ops[i - 1].flags & common)) return false;
  }
  return true;
}

bool valid_batch(const thrifty_batch& b, const thrifty_op* ops, size_t n_ops) {
  if (b.n < 0 || !b.tokens || !b.positions || !b.slots || !b.caches || b.n_outputs < 0) return false;
  if (b.n_outputs > 0 && !b.outputs) return false;
  for (int64_t i = 0; i < b.n; ++i) {
    if (b.slots[i] < 0 || b.slots[i] >= b.n_caches || b.positions[i] < 0) return false;
    if (b.positions[i] >= b.caches[b.slots[i]].capacity) return false;
  }
  for (int64_t i = 0; i < b.n_outputs; ++i) {
    if (b.outputs[i] < 0 || b.outputs[i] >= b.n) return false;
  }
  for (int64_t i = 0; i < b.n_caches; ++i) {
    if (!b.caches[i].base || b.caches[i].capacity % THRIFTY_CACHE_BLOCK != 0) return false;
  }
  for (size_t op = 0; op < n_ops; ++op) {
    for (int64_t i = 0; i < b.n_caches && keeps_states(ops[op]); ++i) {
      if (!b.caches[i].states) return false;
    }
    if (ops[op].code != THRIFTY_OP_EMBED) continue;
    for (int64_t i = 0; i < b.n; ++i) {
      if (b.tokens[i] < 0 || b.tokens[i] >= ops[op].n[0]) return false;
    }
  }
  return true;
}

}  // namespace
}  // namespace thrifty
