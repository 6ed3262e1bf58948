/* The whole native surface of thrifty: arrays in, arrays out, no models.
 *
 * Every function that can fail returns a status; 0 is success. Buffers belong to the caller, nothing is allocated
 * behind its back but the thread pool, and nothing throws. `n_threads` is the most threads a call may use, the caller
 * included; results do not depend on it. Functions may be called from any thread; a call that finds the pool busy runs
 * on its own thread alone. The definitions of the operations are in src/thrifty/spec. */
#ifndef THRIFTY_H
#define THRIFTY_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define THRIFTY_API __declspec(dllexport)
#else
#define THRIFTY_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised when a signature below changes; the loader refuses any other number. */
#define THRIFTY_ABI_VERSION 7

enum thrifty_status {
  THRIFTY_OK = 0,
  THRIFTY_BAD_ARGUMENT = 1,
  THRIFTY_BAD_FORMAT = 2,
  THRIFTY_BAD_CODE = 3,
  THRIFTY_UNKNOWN_ISA = 4,
  THRIFTY_ISA_NOT_BUILT = 5,
  THRIFTY_ISA_NOT_DETECTED = 6,
  THRIFTY_OUT_OF_MEMORY = 7
};

/* Instruction sets, worst first. Bit `1 << isa` stands for one in a mask. */
enum thrifty_isa {
  THRIFTY_GENERIC = 0,
  THRIFTY_NEON = 1,
  THRIFTY_AVX2 = 2,        /* and FMA, F16C */
  THRIFTY_AVX512 = 3,      /* F, BW, VL, DQ, VNNI */
  THRIFTY_AVX512_VBMI = 4, /* and VBMI */
  THRIFTY_AMX = 5,         /* and the tiles of AMX-INT8, where the system grants their state */
  THRIFTY_ISA_COUNT = 6
};

/* Number formats, as src/thrifty/spec/formats.py defines them. Kernels read all but ROW_BLOCK. */
enum thrifty_format {
  THRIFTY_I2 = 0,
  THRIFTY_BASE3 = 1,
  THRIFTY_ROW_BLOCK = 2,
  THRIFTY_I8 = 3,
  THRIFTY_I4 = 4,
  THRIFTY_FORMAT_COUNT = 5
};

THRIFTY_API int thrifty_abi_version(void);
THRIFTY_API const char* thrifty_status_text(int status);

/* Masks of the instruction sets in this build and of those this processor and system have. */
THRIFTY_API uint32_t thrifty_isa_built(void);
THRIFTY_API uint32_t thrifty_isa_detected(void);
THRIFTY_API const char* thrifty_isa_name(int isa);
/* The instruction set in use: the best one both built and detected until another is selected. */
THRIFTY_API int thrifty_isa_selected(void);
/* Uses the named instruction set from now on, or the best for NULL. Fails where it is not built or not detected. */
THRIFTY_API int thrifty_isa_select(const char* name);

/* Runs jobs on the threads of an OpenMP runtime, whose GOMP_parallel this is, from now on, or on the pool again for
 * NULL. Beside a library that uses OpenMP the pool's threads would share cores with that runtime's, which spin for some
 * milliseconds after each of its own jobs. A child of fork is back on the pool. */
THRIFTY_API void thrifty_use_openmp(void (*parallel)(void (*body)(void*), void* data, unsigned threads,
                                                     unsigned flags));

/* Memory aligned to 64 bytes, large blocks to 2 MiB and advised to use huge pages. NULL when there is none. */
THRIFTY_API void* thrifty_buffer_alloc(size_t bytes);
THRIFTY_API void thrifty_buffer_free(void* buffer);
/* Asks for huge pages in memory that nobody has written to yet, where the system has them. */
THRIFTY_API void thrifty_use_huge_pages(void* memory, size_t bytes);

/* Bytes of a packed matrix, padding included; 0 for a bad format or shape. */
THRIFTY_API size_t thrifty_pack_size(int format, int64_t rows, int64_t cols);
/* packed = bytes of codes int8 [rows, cols], each among the format's. */
THRIFTY_API int thrifty_pack(int format, int64_t rows, int64_t cols, const int8_t* codes, uint8_t* packed,
                             int n_threads);
THRIFTY_API int thrifty_unpack(int format, int64_t rows, int64_t cols, const uint8_t* packed, int8_t* codes,
                               int n_threads);

/* The tiles of a ROW_BLOCK matrix [rows, cols] in I2 or BASE3: tile t goes to tile first_tile + t * tile_step of
 * `packed`, so that several matrices can be stacked, or interleaved, in one. */
THRIFTY_API int thrifty_repack(int format, const uint8_t* row_block, int64_t rows, int64_t cols, uint8_t* packed,
                               int64_t first_tile, int64_t tile_step, int n_threads);

/* Types of GGUF files that hold ternary codes, as src/thrifty/spec/gguf_blocks.py defines them. cols: whole blocks of
 * 256 (I2_S: 128). data: rows * cols / 256 * 54 bytes (TQ2_0: 66; I2_S: rows * cols / 4 + THRIFTY_I2_S_TAIL). */
enum thrifty_gguf { THRIFTY_TQ1_0 = 0, THRIFTY_TQ2_0 = 1, THRIFTY_I2_S = 2, THRIFTY_GGUF_COUNT = 3 };
#define THRIFTY_I2_S_TAIL 32
/* data = bytes of codes * scale; codes: int8 [rows, cols], each -1, 0 or 1. */
THRIFTY_API int thrifty_gguf_encode(int kind, const int8_t* codes, int64_t rows, int64_t cols, float scale,
                                    uint8_t* data, int n_threads);
/* codes: int8 [rows, cols], 0 where the scale is; scales: of each block of 256, 0 where all its codes are 0; of I2_S
 * the one there is. */
THRIFTY_API int thrifty_gguf_decode(int kind, const uint8_t* data, int64_t rows, int64_t cols, int8_t* codes,
                                    float* scales, int n_threads);
/* data = Q8_0 of values [rows, cols] in dtype, F32, BF16 or F16: of each 32 columns, a float16 scale and 32
 * signed bytes. BAD_CODE for what is not finite, or too large for such a scale. */
THRIFTY_API int thrifty_quantize_q8_0(const void* values, int dtype, int64_t rows, int64_t cols, uint8_t* data,
                                      int n_threads);
THRIFTY_API int thrifty_dequantize_q8_0(const uint8_t* data, int64_t rows, int64_t cols, float* values, int n_threads);

/* y = float(x . w^T) * (x_scale * w_scale) + bias, the product exact in int32.
 * packed: any format but ROW_BLOCK of [rows, cols]; w_scale: [n_w_scales], 1 or rows; bias: [rows] or NULL; x: int8 [n,
 * x_stride], readable and zero from cols to the format's padded cols; x_scales: [n]; y: [n, rows]. */
THRIFTY_API int thrifty_ternary_matmul(int format, const uint8_t* packed, int64_t rows, int64_t cols,
                                       const float* w_scale, int64_t n_w_scales, const float* bias, const int8_t* x,
                                       int64_t x_stride, const float* x_scales, int64_t n, float* y, int n_threads);

/* codes = round(v * (127 / a)), scales = a / 127, a = max(max |v|, 1e-5), v = rms_norm(x) or x where norm is 0.
 * x: [n, d]; gain: [d] or NULL; codes: [n, stride], zero from d on; scales: [n]. A row that holds a NaN or an infinity
 * gets codes 0 and that value for a scale. */
THRIFTY_API int thrifty_quantize_per_token(const float* x, const float* gain, float eps, int norm, int64_t n, int64_t d,
                                           int8_t* codes, int64_t stride, float* scales, int n_threads);

/* y = (x * r) * gain, r = 1 / sqrt(mean(x^2) + eps). x, y: [n, d], which may be the same; gain: [d] or NULL. */
THRIFTY_API int thrifty_rms_norm(const float* x, const float* gain, float eps, int64_t n, int64_t d, float* y,
                                 int n_threads);

/* y = act(gate) * up, elementwise over `count` floats; `up` NULL stands for ones. y may be gate or up. The bits are
 * those of the epilogue GATE_UP (of ACT without `up`) in a step. activation: enum thrifty_activation. */
THRIFTY_API int thrifty_glu(const float* gate, const float* up, int activation, int64_t count, float* y, int n_threads);

/* ends[h, j] = the first query at which `window` better keys precede it, `keys` where there is none: key j of
 * head h is active for the queries j ... ends[h, j] - 1. Of equal scores the newer key is the better one.
 * scores, ends: [heads, keys], keys below 2^32; scratch: [heads, min(window, keys)]. */
THRIFTY_API int thrifty_kept_until(const float* scores, int64_t heads, int64_t keys, int64_t window, uint64_t* scratch,
                                   int64_t* ends, int n_threads);

/* The k best of all sums x_i + y_j of each row, best first: the sums, and numbers i * n + j; of equal sums the smaller
 * number. x, y: [rows, n], n <= 65536; sums, numbers: [rows, k], k <= n * n. */
#define THRIFTY_MOST_CHOSEN 512
THRIFTY_API int thrifty_product_key_topk(const float* x, int64_t x_stride, const float* y, int64_t y_stride,
                                         int64_t rows, int64_t n, int64_t k, float* sums, int64_t* numbers,
                                         int n_threads);

/* hidden_s = x . down_e, y = sum_s w_s act(hidden_s) up_e, e the s-th of a row's k experts.
 * x, y: [n, d]; indices, weights, hidden: [n, k]; down, up: [experts, d] in dtype, F32, BF16 or F16;
 * activation: enum thrifty_activation. `up` NULL: hidden alone; `down` NULL: y = sum_s w_s up_e. */
THRIFTY_API int thrifty_product_key_experts(const float* x, const int64_t* indices, const float* weights,
                                            const void* down, const void* up, int dtype, int activation, int64_t n,
                                            int64_t k, int64_t d, int64_t experts, float* hidden, float* y,
                                            int n_threads);

/* Reads a buffer once and tells how fast. loop 0: linear; 1: linear, prefetched 4 KiB ahead; 2: four streams a thread.
 * The buffer is cut between threads as a matrix is. */
THRIFTY_API int thrifty_read_bandwidth(const void* buffer, size_t bytes, int loop, int n_threads,
                                       double* bytes_per_second);
/* Operations a second, two for each product, of the best int8 product of the instruction set in use (tiles of AMX,
 * vpdpbusd, vpmaddubsw, smlal) on operands in registers, for about `seconds`. */
THRIFTY_API int thrifty_int8_peak(int n_threads, double seconds, double* ops_per_second);
/* Drops a buffer from the processor's caches where it has an instruction for that, so that the next reading is timed
 * from memory. */
THRIFTY_API void thrifty_cache_evict(const void* buffer, size_t bytes);

/* ---- A step: a program of ops over buffers of the caller, run as one job of the pool. ---- */

/* Floats as tables, matrices and caches store them; INT8 is for caches only, with a scale per position and head; Q8_0,
 * as thrifty_quantize_q8_0 makes it, is for EMBED and FLOAT_MATMUL, with whole blocks of 32 columns. */
enum thrifty_dtype { THRIFTY_F32 = 0, THRIFTY_BF16 = 1, THRIFTY_F16 = 2, THRIFTY_INT8 = 3, THRIFTY_Q8_0 = 4 };

enum thrifty_activation {
  THRIFTY_SILU = 0,
  THRIFTY_GELU = 1,
  THRIFTY_GELU_TANH = 2,
  THRIFTY_RELU = 3,
  THRIFTY_RELU2 = 4,
  THRIFTY_SIGMOID = 5
};

/* What a product does with a value v of column c. GATE_UP: tiles of 16 rows alternate between gate and up, and
 * y = act(gate) * up. MULTIPLY: y = y * v, for an up whose input is not the gate's. */
enum thrifty_epilogue {
  THRIFTY_STORE = 0,
  THRIFTY_ADD = 1,
  THRIFTY_ACT = 2,
  THRIFTY_GATE_UP = 3,
  THRIFTY_MULTIPLY = 4
};

/* Keys and values of one sequence: base, aligned to 64 bytes, of thrifty_cache_size bytes for `capacity` positions,
 * a multiple of THRIFTY_CACHE_BLOCK. Nothing needs to be zero. Where the keys of a layer lie is the library's affair,
 * and depends on dtype, kv_heads and head_dim. states: what ops keep that does not grow with the positions, aligned
 * alike; each says where, and how many bytes. NULL where no op does. */
#define THRIFTY_CACHE_BLOCK 64
typedef struct thrifty_slot {
  void* base;
  int64_t capacity;
  void* states;
} thrifty_slot;
THRIFTY_API size_t thrifty_cache_size(int dtype, int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t capacity);
/* The first `count` positions of a cache as plain arrays, or with `into` from those arrays into the cache. k, v:
 * [layers, kv_heads, count, head_dim] of dtype, as stored; k_scales, v_scales: float [layers, kv_heads, count] of INT8,
 * else NULL. */
THRIFTY_API int thrifty_cache_copy(int dtype, int64_t layers, int64_t kv_heads, int64_t head_dim,
                                   const thrifty_slot* cache, int64_t count, void* k, void* v, float* k_scales,
                                   float* v_scales, int into);

/* The rows of a step: one of each of several sequences, a stretch of one, or both. Rows of a sequence are adjacent and
 * in order. `outputs`: rows that go on after an op with THRIFTY_GATHER. */
typedef struct thrifty_batch {
  int64_t n;
  const int32_t* tokens;    /* [n] */
  const int32_t* positions; /* [n] in the sequence */
  const int32_t* slots;     /* [n] */
  int64_t n_outputs;
  const int32_t* outputs; /* [n_outputs] */
  int64_t n_caches;
  const thrifty_slot* caches; /* [n_caches] */
} thrifty_batch;

/* An op begins when the one before it is done, or as if it were. PRIVATE stands on a QUANTIZE or RMS_NORM and on the
 * product after it, which alone reads it: of one row, every thread that has a part in the product makes a copy of its
 * own, in the buffer's row `thread`, for less than it costs to wait for another's. */
enum thrifty_op_flags {
  THRIFTY_PRIVATE = 1,
  THRIFTY_GATHER = 2,  /* input rows are outputs[i] */
  THRIFTY_OUTPUTS = 4, /* the op has n_outputs rows */
  THRIFTY_NORM = 8     /* QUANTIZE: rms_norm first */
};

/* The fields of each op, in the order of n; f; p. Strides are in elements.
 * EMBED         table rows, d, dtype, x stride;; table, x
 * QUANTIZE      d, x stride, codes stride; eps; x, gain or NULL, codes int8, scales
 * RMS_NORM      d, x stride, y stride; eps; x, gain or NULL, y
 * MATMUL        format, rows, cols, x stride, y stride, y cols, epilogue, activation;; packed, w_scale [rows padded to
 *               16], bias alike or NULL, codes, scales, y, factors [y cols] of what ADD adds to, or NULL
 * FLOAT_MATMUL  the same with a dtype for the format;; weights [rows, cols], NULL, bias or NULL, x, NULL, y, factors
 * ROPE_CACHE    heads, kv heads, head dim, layer, cache dtype, qkv stride, k offset, v offset;; qkv, cos, sin
 *               [positions, head dim / 2]. Turns q where it is; k and v go to the caches.
 * ATTENTION     heads, kv heads, head dim, layer, cache dtype, q stride, y stride, scratch; scale; q, y, scratch:
 *               floats, at least (round_up(head dim, 16) + 16) * heads * chunks of 256 positions for each row that
 *               is to be split between threads. y lies in no k or v that a ROPE_CACHE before it reads.
 * HEADS         heads, more heads, head dim, x stride, more at; eps; x, cos, sin or NULL, gain, more gain or NULL. In
 *               place, rms_norm and rotary positions, each where given, of `heads` heads from 0 and of `more` heads
 *               from `more at` on.
 * KEY_SCORES    width, heads, x stride;; x, A [heads], weights float [heads, width], bias [heads] or NULL, y [heads]:
 *               exp(A softplus(W x + b)), in float64.
 * DYNAMIC_MASK  heads, kv heads, head dim, score heads, window or 0 for all, cache dtype, stride, layer, at; scale; q,
 *               k, v, scores [score heads], y [heads * head dim]. Keeps a key among the `window` best of its score
 *               head, the newer of equals, and attends to those kept, scores added; with q and y NULL it only keeps.
 *               Layer l lies at + l * bytes behind `states`: keys and values as of thrifty_cache_size for score heads
 *               and s slots, s = min(window, capacity) padded to THRIFTY_CACHE_BLOCK, then scores float and positions
 *               int32 [score heads, s].
 * MLGRU         d, x stride, y stride, at, 1 for silu(h) or 0;; f, c, g or NULL for ones, y, bounds [d] or NULL for
 *               zeros: f = bounds + (1 - bounds) f, h = f h + (1 - f) c, y = g h, or g silu(h). State: d floats.
 * SSD           heads, groups, p, n, x stride, dt stride, y stride, at;; x [heads * p], B, C [groups * n], dt [heads],
 *               A [heads], y [heads * p]: with s = softplus(dt), h = exp(A s) h + s x B^T, y = h C. B and C have the
 *               stride of x. State: floats [heads, n, p padded to 16].
 * EXPERTS       heads, k, n, d, dtype, activation, norm (0 or 1), x stride, scratch stride;; x, scores [2, heads, n],
 *               down, up [n * n, d], shared, y, factors of y or NULL, scratch: 4 heads k + d floats or more, an even
 *               count. y = factors y + (shared + experts): each head's k best, weighted by the softmax of their sums,
 *               which are divided by the sum over all heads where norm is 1. shared and y have stride d.
 * What MLGRU and SSD keep, and which slots of DYNAMIC_MASK are filled, begins anew at position 0. */
enum thrifty_op_code {
  THRIFTY_OP_EMBED = 0,
  THRIFTY_OP_QUANTIZE = 1,
  THRIFTY_OP_RMS_NORM = 2,
  THRIFTY_OP_MATMUL = 3,
  THRIFTY_OP_FLOAT_MATMUL = 4,
  THRIFTY_OP_ROPE_CACHE = 5,
  THRIFTY_OP_ATTENTION = 6,
  THRIFTY_OP_HEADS = 7,
  THRIFTY_OP_KEY_SCORES = 8,
  THRIFTY_OP_DYNAMIC_MASK = 9,
  THRIFTY_OP_MLGRU = 10,
  THRIFTY_OP_SSD = 11,
  THRIFTY_OP_EXPERTS = 12,
  THRIFTY_OP_COUNT = 13
};
typedef struct thrifty_op {
  int32_t code;
  int32_t flags;
  int64_t n[10];
  float f[2];
  void* p[8];
} thrifty_op;

#define THRIFTY_MOST_OPS 4096

/* Runs a program on a batch. seconds: [n_ops] or NULL, the time of each op on the first thread, waiting included.
 * n_ops: at most THRIFTY_MOST_OPS. Results depend neither on n_threads nor, row by row, on the rest of the batch. */
THRIFTY_API int thrifty_run(const thrifty_op* ops, int64_t n_ops, const thrifty_batch* batch, int n_threads,
                            double* seconds);

#ifdef __cplusplus
}
#endif

#endif
