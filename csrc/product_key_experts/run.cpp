#include "../kernels.hpp"
#include "../pool.hpp"
#include "thrifty.h"

using namespace thrifty;

namespace {

// Elements of rows read, and of scores ranked, below which a thread more does not pay.
constexpr size_t kGrain = 16 << 10;
constexpr size_t kTopkGrain = 8 << 10;

}  // namespace

int thrifty_product_key_experts(const float* x, const int64_t* indices, const float* weights, const void* down,
                                const void* up, int dtype, int activation, int64_t n, int64_t k, int64_t d,
                                int64_t experts, float* hidden, float* y, int n_threads) {
  const bool fits = n >= 0 && k > 0 && d > 0 && experts > 0 && indices && (down || up) && (!down || (x && hidden)) &&
                    (!up || (weights && y));
  if (!fits || activation < THRIFTY_SILU || activation > THRIFTY_SIGMOID) return THRIFTY_BAD_ARGUMENT;
  if (dtype < THRIFTY_F32 || dtype > THRIFTY_F16) return THRIFTY_BAD_FORMAT;
  for (int64_t i = 0; i < n * k; ++i) {
    if (indices[i] < 0 || indices[i] >= experts) return THRIFTY_BAD_ARGUMENT;
  }
  if (n == 0) return THRIFTY_OK;
  const ProductKeyExperts e{x, indices, weights, down, up, dtype, activation, size_t(k), size_t(d), hidden, y};
  const auto run = kernels().product_key_experts;
  run_ranges(size_t(n), e.k * e.d, kGrain, n_threads, [&](size_t first, size_t end) { run(e, first, end); });
  return THRIFTY_OK;
}

int thrifty_product_key_topk(const float* x, int64_t x_stride, const float* y, int64_t y_stride, int64_t rows,
                             int64_t n, int64_t k, float* sums, int64_t* numbers, int n_threads) {
  const bool fits = x && y && sums && numbers && rows >= 0 && n > 0 && n <= 65536 && x_stride >= n && y_stride >= n;
  if (!fits || k < 1 || k > THRIFTY_MOST_CHOSEN || k > n * n) return THRIFTY_BAD_ARGUMENT;
  const auto run = kernels().product_key_topk;
  run_ranges(size_t(rows), size_t(n + 4 * k), kTopkGrain, n_threads, [&](size_t first, size_t end) {
    for (size_t t = first; t < end; ++t) {
      run(x + t * size_t(x_stride), y + t * size_t(y_stride), size_t(n), size_t(k), sums + t * size_t(k),
          numbers + t * size_t(k));
    }
  });
  return THRIFTY_OK;
}
