#include <atomic>
#include <chrono>
#include <cstring>

#include "cpu.hpp"
#include "formats.hpp"
#include "kernels.hpp"
#include "pool.hpp"
#include "thrifty.h"

namespace thrifty {
namespace {

// Bytes of weights, times rows of x, and elements of x below which a thread more does not pay.
constexpr size_t kMatmulGrain = 32 << 10;
constexpr size_t kQuantizeGrain = 16 << 10;
// Turns of products between two looks at the clock.
constexpr uint64_t kPeakTurns = 4096;

#define THRIFTY_MATMULS(isa, base3_isa) \
  {isa::matmul_i2, base3_isa::matmul_base3, nullptr, isa::matmul_i8, isa::matmul_i4}
#define THRIFTY_STEP(isa, attend_isa)                                                                      \
  isa::float_matmul, isa::rope_cache, attend_isa::attend, isa::attend_chunks, isa::merge_chunks, isa::glu, \
      isa::product_key_topk, isa::product_key_experts, isa::turn_heads, isa::dynamic_mask, isa::mlgru, isa::ssd

constexpr Kernels kGeneric = {THRIFTY_MATMULS(generic, generic), generic::quantize, generic::rms_norm,
                              THRIFTY_STEP(generic, generic),    generic::read,     generic::multiply};
#if defined(THRIFTY_BUILD_NEON)
// Heads and the float ops are plain C++ there, which compilers vectorise.
constexpr Kernels kNeon = {{neon::matmul_i2, neon::matmul_base3, nullptr, generic::matmul_i8, generic::matmul_i4},
                           neon::quantize,
                           neon::rms_norm,
                           THRIFTY_STEP(generic, generic),
                           generic::read,
                           neon::multiply};
#endif
#if defined(THRIFTY_BUILD_AVX2)
constexpr Kernels kAvx2 = {THRIFTY_MATMULS(avx2, avx2), avx2::quantize, avx2::rms_norm,
                           THRIFTY_STEP(avx2, avx2),    generic::read,  avx2::multiply};
#endif
#if defined(THRIFTY_BUILD_AVX512)
constexpr Kernels kAvx512 = {THRIFTY_MATMULS(avx512, avx512), avx512::quantize, avx512::rms_norm,
                             THRIFTY_STEP(avx512, avx512),    avx512::read,     avx512::multiply};
#endif
#if defined(THRIFTY_BUILD_AVX512_VBMI)
constexpr Kernels kAvx512Vbmi = {THRIFTY_MATMULS(avx512, avx512_vbmi), avx512::quantize, avx512::rms_norm,
                                 THRIFTY_STEP(avx512, avx512),         avx512::read,     avx512::multiply};
#endif
#if defined(THRIFTY_BUILD_AMX)
constexpr Kernels kAmx = {THRIFTY_MATMULS(amx, amx), avx512::quantize, avx512::rms_norm,
                          THRIFTY_STEP(avx512, amx), avx512::read,     amx::multiply};
#endif

struct Isa {
  const char* name;
  const Kernels* kernels;  // null where not built
};

constexpr Isa kIsas[THRIFTY_ISA_COUNT] = {
    {"generic", &kGeneric},
#if defined(THRIFTY_BUILD_NEON)
    {"neon", &kNeon},
#else
    {"neon", nullptr},
#endif
#if defined(THRIFTY_BUILD_AVX2)
    {"avx2", &kAvx2},
#else
    {"avx2", nullptr},
#endif
#if defined(THRIFTY_BUILD_AVX512)
    {"avx512", &kAvx512},
#else
    {"avx512", nullptr},
#endif
#if defined(THRIFTY_BUILD_AVX512_VBMI)
    {"avx512_vbmi", &kAvx512Vbmi},
#else
    {"avx512_vbmi", nullptr},
#endif
#if defined(THRIFTY_BUILD_AMX)
    {"amx", &kAmx},
#else
    {"amx", nullptr},
#endif
};

// -1 until the first use.
std::atomic<int> selected{-1};

int best() {
  const uint32_t usable = thrifty_isa_built() & detected_isas();
  int isa = THRIFTY_ISA_COUNT - 1;
  while (!((usable >> isa) & 1)) --isa;
  return isa;
}

bool valid_rows(const void* x, int64_t n, int64_t d, const void* out) { return x && out && n >= 0 && d > 0; }

}  // namespace

const Kernels& kernels() { return *kIsas[thrifty_isa_selected()].kernels; }

}  // namespace thrifty

using namespace thrifty;

int thrifty_abi_version(void) { return THRIFTY_ABI_VERSION; }

const char* thrifty_status_text(int status) {
  switch (status) {
    case THRIFTY_OK: return "ok";
    case THRIFTY_BAD_ARGUMENT: return "a shape, stride or pointer is out of range";
    case THRIFTY_BAD_FORMAT: return "the operation does not know this number format";
    case THRIFTY_BAD_CODE: return "a weight is none of the codes of its format";
    case THRIFTY_UNKNOWN_ISA: return "no instruction set has this name";
    case THRIFTY_ISA_NOT_BUILT: return "the library was built without this instruction set";
    case THRIFTY_ISA_NOT_DETECTED: return "the processor or the operating system lacks this instruction set";
    case THRIFTY_OUT_OF_MEMORY: return "out of memory";
    default: return "unknown status";
  }
}

uint32_t thrifty_isa_built(void) {
  uint32_t mask = 0;
  for (int isa = 0; isa < THRIFTY_ISA_COUNT; ++isa) mask |= uint32_t{kIsas[isa].kernels != nullptr} << isa;
  return mask;
}

uint32_t thrifty_isa_detected(void) { return detected_isas(); }

const char* thrifty_isa_name(int isa) { return isa >= 0 && isa < THRIFTY_ISA_COUNT ? kIsas[isa].name : nullptr; }

int thrifty_isa_selected(void) {
  int isa = selected.load(std::memory_order_relaxed);
  if (isa >= 0) return isa;
  int none = -1;
  selected.compare_exchange_strong(none, best(), std::memory_order_relaxed);
  return selected.load(std::memory_order_relaxed);
}

int thrifty_isa_select(const char* name) {
  if (name == nullptr) {
    selected.store(best(), std::memory_order_relaxed);
    return THRIFTY_OK;
  }
  for (int isa = 0; isa < THRIFTY_ISA_COUNT; ++isa) {
    if (std::strcmp(name, kIsas[isa].name) != 0) continue;
    if (kIsas[isa].kernels == nullptr) return THRIFTY_ISA_NOT_BUILT;
    if (!((detected_isas() >> isa) & 1)) return THRIFTY_ISA_NOT_DETECTED;
    selected.store(isa, std::memory_order_relaxed);
    return THRIFTY_OK;
  }
  return THRIFTY_UNKNOWN_ISA;
}

int thrifty_ternary_matmul(int format, const uint8_t* packed, int64_t rows, int64_t cols, const float* w_scale,
                           int64_t n_w_scales, const float* bias, const int8_t* x, int64_t x_stride,
                           const float* x_scales, int64_t n, float* y, int n_threads) {
  if (!valid_format(format) || format == THRIFTY_ROW_BLOCK) return THRIFTY_BAD_FORMAT;
  if (!valid_shape(rows, cols) || cols > kFormats[format].most_cols || !packed || !w_scale || !x_scales ||
      !valid_rows(x, n, cols, y))
    return THRIFTY_BAD_ARGUMENT;
  const size_t block_cols = kFormats[format].col_multiple;
  const size_t padded = round_up(size_t(cols), block_cols);
  if ((n_w_scales != 1 && n_w_scales != rows) || x_stride < int64_t(padded)) return THRIFTY_BAD_ARGUMENT;
  if (n == 0) return THRIFTY_OK;
  const TernaryMatmul m{
      packed, padded / block_cols, size_t(rows), w_scale,   n_w_scales != 1,
      x,      size_t(x_stride),    x_scales,     size_t(n), {y, size_t(rows), size_t(rows), bias, THRIFTY_STORE, 0}};
  const auto run = kernels().matmul[format];
  // Kernels may read two streams, the halves of a range: an even count of tiles leaves none to be read alone.
  const size_t tiles = round_up(m.rows, kTileRows) / kTileRows;
  run_ranges(round_up(tiles, 2) / 2, 2 * m.blocks * kBlockBytes * m.n, kMatmulGrain, n_threads,
             [&](size_t first, size_t end) { run(m, 2 * first, 2 * end < tiles ? 2 * end : tiles); });
  return THRIFTY_OK;
}

int thrifty_quantize_per_token(const float* x, const float* gain, float eps, int norm, int64_t n, int64_t d,
                               int8_t* codes, int64_t stride, float* scales, int n_threads) {
  if (!valid_rows(x, n, d, codes) || !scales || stride < d) return THRIFTY_BAD_ARGUMENT;
  if (n == 0) return THRIFTY_OK;
  const TokenRows rows{x, gain, eps, norm != 0, size_t(d), size_t(d), codes, size_t(stride), scales, nullptr};
  const auto run = kernels().quantize;
  run_ranges(size_t(n), rows.d, kQuantizeGrain, n_threads, [&](size_t first, size_t end) { run(rows, first, end); });
  return THRIFTY_OK;
}

int thrifty_rms_norm(const float* x, const float* gain, float eps, int64_t n, int64_t d, float* y, int n_threads) {
  if (!valid_rows(x, n, d, y)) return THRIFTY_BAD_ARGUMENT;
  if (n == 0) return THRIFTY_OK;
  const TokenRows rows{x, gain, eps, true, size_t(d), size_t(d), nullptr, size_t(d), nullptr, y};
  const auto run = kernels().rms_norm;
  run_ranges(size_t(n), rows.d, kQuantizeGrain, n_threads, [&](size_t first, size_t end) { run(rows, first, end); });
  return THRIFTY_OK;
}

int thrifty_glu(const float* gate, const float* up, int activation, int64_t count, float* y, int n_threads) {
  if (!gate || !y || count < 0 || activation < THRIFTY_SILU || activation > THRIFTY_SIGMOID)
    return THRIFTY_BAD_ARGUMENT;
  const auto run = kernels().glu;
  const size_t all = size_t(count);
  run_ranges(round_up(all, 16) / 16, 64, kQuantizeGrain, n_threads, [&](size_t first, size_t end) {
    const size_t from = 16 * first, to = 16 * end < all ? 16 * end : all;
    run(gate + from, up ? up + from : nullptr, activation, to - from, y + from);
  });
  return THRIFTY_OK;
}

int thrifty_read_bandwidth(const void* buffer, size_t bytes, int loop, int n_threads, double* bytes_per_second) {
  if (!buffer || bytes < 64 || loop < 0 || loop > 2 || !bytes_per_second) return THRIFTY_BAD_ARGUMENT;
  const auto read = kernels().read;
  std::atomic<uint64_t> sink{0};
  const auto start = std::chrono::steady_clock::now();
  run_ranges(bytes / 64, 64, kMatmulGrain, n_threads, [&](size_t first, size_t end) {
    sink ^= read(static_cast<const char*>(buffer) + 64 * first, 64 * (end - first), loop);
  });
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  *bytes_per_second = double(bytes / 64 * 64) / elapsed.count();
  return THRIFTY_OK;
}

int thrifty_int8_peak(int n_threads, double seconds, double* ops_per_second) {
  if (!(seconds > 0) || !ops_per_second) return THRIFTY_BAD_ARGUMENT;
  using Clock = std::chrono::steady_clock;
  struct Context {
    uint64_t (*multiply)(uint64_t turns, uint32_t* sink);
    Clock::time_point end;
    std::atomic<uint64_t> products{0};
    std::atomic<uint32_t> sink{0};
  } context;
  context.multiply = kernels().multiply;
  const auto start = Clock::now();
  context.end = start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  const int threads = n_threads < 1 ? 1 : n_threads > kMostThreads ? kMostThreads : n_threads;
  run_parts(
      threads, 1,
      [](const void* pointer, int, int) {
        auto& c = *static_cast<Context*>(const_cast<void*>(pointer));
        uint64_t products = 0;
        uint32_t sink = 0;
        do products += c.multiply(kPeakTurns, &sink);
        while (Clock::now() < c.end);
        c.products += products;
        c.sink ^= sink;
      },
      &context);
  const std::chrono::duration<double> elapsed = Clock::now() - start;
  *ops_per_second = 2.0 * double(context.products) / elapsed.count();
  return THRIFTY_OK;
}
