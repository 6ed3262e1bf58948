#pragma once

#include <cstddef>
#include <cstdint>

#include "thrifty.h"

namespace thrifty {

/// Rows of a tile, one per 32-bit lane of a 512-bit register, and bytes of a block: a dword per row.
constexpr size_t kTileRows = 16;
constexpr size_t kBlockBytes = 4 * kTileRows;

/// Columns that a block covers.
constexpr size_t kI2Cols = 16;
constexpr size_t kBase3Cols = 20;
constexpr size_t kI8Cols = 4;
constexpr size_t kI4Cols = 8;

/// Where the values of a product go, and what becomes of them on the way.
struct Output {
  float* y;
  size_t stride;
  size_t cols;
  const float* bias;
  int epilogue;
  int activation;
  const float* factors = nullptr;  // of y, where the epilogue adds to it
};

/// A product with packed weights, its arguments checked.
struct TernaryMatmul {
  const uint8_t* packed;
  size_t blocks;  // in a tile
  size_t rows;
  const float* w_scale;
  bool scale_per_row;
  const int8_t* x;
  size_t x_stride;
  const float* x_scales;
  size_t n;
  Output out;
};

/// A product with floats as a checkpoint stores them.
struct FloatMatmul {
  const void* weights;  // [rows, cols]
  int dtype;
  size_t rows;
  size_t cols;
  const float* x;
  size_t x_stride;
  size_t n;
  Output out;
};

/// Arguments of thrifty_quantize_per_token and of thrifty_rms_norm, checked.
struct TokenRows {
  const float* x;
  const float* gain;
  float eps;
  bool norm;
  size_t d;
  size_t x_stride;
  int8_t* codes;
  size_t stride;  // of codes or y
  float* scales;
  float* y;
};

/// Heads of a layer and how its cache stores them.
struct Heads {
  size_t heads;
  size_t kv_heads;
  size_t head_dim;
  size_t layer;
  int dtype;
};

struct RopeCache {
  Heads shape;
  const thrifty_batch* batch;
  float* qkv;
  size_t stride;
  size_t k_offset;
  size_t v_offset;
  const float* cos;
  const float* sin;
};

struct Attention {
  Heads shape;
  const thrifty_batch* batch;
  const float* q;
  size_t q_stride;
  float* y;
  size_t y_stride;
  float scale;
  float* scratch;
  size_t most_chunks;  // of a row, in the scratch
};

/// Keys kept by their scores, a bounded number for each score head of a sequence.
struct DynamicMask {
  Heads shape;  // kv_heads: score heads, each of which keeps keys of its own
  const thrifty_batch* batch;
  size_t kv_heads;
  size_t window;  // 0 for all
  size_t at;
  size_t stride;  // of q, k and v
  const float* q;
  const float* k;
  const float* v;
  const float* scores;
  float* y;
  float scale;
};

struct Mlgru {
  const thrifty_batch* batch;
  size_t rows;
  size_t d;
  size_t x_stride;
  size_t y_stride;
  size_t at;
  const float* f;
  const float* c;
  const float* g;
  float* y;
  const float* bounds;
  bool silu;
};

struct Ssd {
  const thrifty_batch* batch;
  size_t rows;
  size_t heads;
  size_t groups;
  size_t p;
  size_t n;
  size_t x_stride;
  size_t dt_stride;
  size_t y_stride;
  size_t at;
  const float* x;
  const float* b;
  const float* c;
  const float* dt;
  const float* a;
  float* y;
};

/// Experts of one hidden unit, k for each row of x. Without `up` the hidden values are all that is wanted, without
/// `down` the sum of `up` rows by the weights.
struct ProductKeyExperts {
  const float* x;
  const int64_t* indices;  // [rows, k], as weights and hidden
  const float* weights;
  const void* down;  // [experts, d], as up
  const void* up;
  int dtype;
  int activation;
  size_t k;
  size_t d;
  float* hidden;
  float* y;
};

/// Positions of a chunk: src/thrifty/spec/attention.py.
constexpr size_t kChunk = 256;
/// Largest head of an int8 cache, so that a sum of d products of codes is exact as a float, and code of a weight, so
/// that a sum of 256 products stays in int32.
constexpr size_t kMostInt8Dim = 1024;
constexpr int kMostWeight = 32512;
/// Queries that are held against a chunk of keys at once: where few read a cache, and where a stretch of it is made.
constexpr size_t kQueries = 8;
constexpr size_t kBlockQueries = 32;

/// What an instruction set brings. Ranges are tiles of the matrix, and rows of x.
///
/// The files behind a table are compiled with flags of their own, so whatever they share must have internal linkage:
/// the linker keeps one copy of an inline function, and it may be the one an older processor cannot run.
struct Kernels {
  void (*matmul[THRIFTY_FORMAT_COUNT])(const TernaryMatmul&, size_t first_tile, size_t end_tile);
  void (*quantize)(const TokenRows&, size_t first_row, size_t end_row);
  void (*rms_norm)(const TokenRows&, size_t first_row, size_t end_row);
  void (*float_matmul)(const FloatMatmul&, size_t first_tile, size_t end_tile);
  /// Items are pairs of a row and a kv head, the head varying first.
  void (*rope_cache)(const RopeCache&, size_t first_item, size_t end_item);
  /// Rows of one sequence and one kv head over the whole cache.
  void (*attend)(const Attention&, size_t row, size_t rows, size_t kv_head);
  /// One row and kv head over some chunks, into the scratch; and the merge of a row's chunks.
  void (*attend_chunks)(const Attention&, size_t row, size_t kv_head, size_t first_chunk, size_t end_chunk);
  void (*merge_chunks)(const Attention&, size_t row, size_t kv_head);
  void (*glu)(const float* gate, const float* up, int activation, size_t count, float* y);
  /// One row of thrifty_product_key_topk.
  void (*product_key_topk)(const float* x, const float* y, size_t n, size_t k, float* sums, int64_t* numbers);
  void (*product_key_experts)(const ProductKeyExperts&, size_t first_row, size_t end_row);
  /// Turns heads that lie side by side to one position.
  void (*turn_heads)(float* x, const float* cos, const float* sin, size_t head_dim, size_t heads);
  /// Rows of one sequence, in order, and one score head.
  void (*dynamic_mask)(const DynamicMask&, size_t first_row, size_t end_row, size_t score_head);
  /// All rows; ranges are blocks of sixteen columns, and heads.
  void (*mlgru)(const Mlgru&, size_t first_block, size_t end_block);
  void (*ssd)(const Ssd&, size_t first_head, size_t end_head);
  uint64_t (*read)(const void* bytes, size_t count, int loop);
  /// Multiplies bytes and adds the products, in registers alone, and returns how many; the sums go into the sink.
  uint64_t (*multiply)(uint64_t turns, uint32_t* sink);
};

/// Of the instruction set in use.
const Kernels& kernels();

#define THRIFTY_MATMUL(isa)                                            \
  namespace isa {                                                      \
  void matmul_i2(const TernaryMatmul& m, size_t first, size_t end);    \
  void matmul_base3(const TernaryMatmul& m, size_t first, size_t end); \
  void matmul_i8(const TernaryMatmul& m, size_t first, size_t end);    \
  void matmul_i4(const TernaryMatmul& m, size_t first, size_t end);    \
  }
#define THRIFTY_STEP(isa)                                                                       \
  namespace isa {                                                                               \
  void float_matmul(const FloatMatmul& m, size_t first, size_t end);                            \
  void rope_cache(const RopeCache& r, size_t first, size_t end);                                \
  void attend(const Attention& a, size_t row, size_t rows, size_t kv_head);                     \
  void attend_chunks(const Attention& a, size_t row, size_t kv_head, size_t first, size_t end); \
  void merge_chunks(const Attention& a, size_t row, size_t kv_head);                            \
  void glu(const float* gate, const float* up, int act, size_t count, float* y);                \
  void product_key_topk(const float* x, const float* y, size_t n, size_t k, float*, int64_t*);  \
  void product_key_experts(const ProductKeyExperts& e, size_t first, size_t end);               \
  void turn_heads(float* x, const float* cos, const float* sin, size_t d, size_t heads);        \
  void dynamic_mask(const DynamicMask& m, size_t first, size_t end, size_t head);               \
  void mlgru(const Mlgru& m, size_t first, size_t end);                                         \
  void ssd(const Ssd& s, size_t first, size_t end);                                             \
  }
#define THRIFTY_QUANTIZE(isa)                                     \
  namespace isa {                                                 \
  void quantize(const TokenRows& rows, size_t first, size_t end); \
  void rms_norm(const TokenRows& rows, size_t first, size_t end); \
  }
#define THRIFTY_PEAK(isa)                            \
  namespace isa {                                    \
  uint64_t multiply(uint64_t turns, uint32_t* sink); \
  }

THRIFTY_MATMUL(generic)
THRIFTY_MATMUL(neon)
THRIFTY_MATMUL(avx2)
THRIFTY_MATMUL(avx512)
namespace avx512_vbmi {
void matmul_base3(const TernaryMatmul& m, size_t first, size_t end);
}
THRIFTY_MATMUL(amx)
THRIFTY_QUANTIZE(generic)
THRIFTY_QUANTIZE(neon)
THRIFTY_QUANTIZE(avx2)
THRIFTY_QUANTIZE(avx512)
THRIFTY_STEP(generic)
THRIFTY_STEP(avx2)
THRIFTY_STEP(avx512)
namespace amx {
void attend(const Attention& a, size_t row, size_t rows, size_t kv_head);
}
namespace generic {
uint64_t read(const void* bytes, size_t count, int loop);
}
namespace avx512 {
uint64_t read(const void* bytes, size_t count, int loop);
}
THRIFTY_PEAK(generic)
THRIFTY_PEAK(neon)
THRIFTY_PEAK(avx2)
THRIFTY_PEAK(avx512)
THRIFTY_PEAK(amx)

#undef THRIFTY_MATMUL
#undef THRIFTY_QUANTIZE
#undef THRIFTY_PEAK
#undef THRIFTY_STEP

}  // namespace thrifty
