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
#define THRIFTY_ABI_VERSION 1

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
  THRIFTY_AVX2 = 2,
  THRIFTY_AVX512 = 3,      /* F, BW, VL, DQ, VNNI */
  THRIFTY_AVX512_VBMI = 4, /* and VBMI */
  THRIFTY_ISA_COUNT = 5
};

/* Number formats, as src/thrifty/spec/formats.py defines them. Kernels read the first two. */
enum thrifty_format { THRIFTY_I2 = 0, THRIFTY_BASE3 = 1, THRIFTY_ROW_BLOCK = 2, THRIFTY_FORMAT_COUNT = 3 };

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

/* Memory aligned to 64 bytes, large blocks to 2 MiB and advised to use huge pages. NULL when there is none. */
THRIFTY_API void* thrifty_buffer_alloc(size_t bytes);
THRIFTY_API void thrifty_buffer_free(void* buffer);

/* Bytes of a packed matrix, padding included; 0 for a bad format or shape. */
THRIFTY_API size_t thrifty_pack_size(int format, int64_t rows, int64_t cols);
/* packed = bytes of codes int8 [rows, cols], each -1, 0 or 1. */
THRIFTY_API int thrifty_pack(int format, int64_t rows, int64_t cols, const int8_t* codes, uint8_t* packed);
THRIFTY_API int thrifty_unpack(int format, int64_t rows, int64_t cols, const uint8_t* packed, int8_t* codes);

/* y = float(x . w^T) * (x_scale * w_scale) + bias, the product exact in int32.
 * packed: I2 or BASE3 of [rows, cols]; w_scale: [n_w_scales], 1 or rows; bias: [rows] or NULL; x: int8 [n, x_stride],
 * readable and zero from cols to the format's padded cols; x_scales: [n]; y: [n, rows]. */
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

/* Reads a buffer once and tells how fast. loop 0: linear; 1: linear, prefetched 4 KiB ahead; 2: four streams a thread.
 * The buffer is cut between threads as a matrix is. */
THRIFTY_API int thrifty_read_bandwidth(const void* buffer, size_t bytes, int loop, int n_threads,
                                       double* bytes_per_second);

#ifdef __cplusplus
}
#endif

#endif
