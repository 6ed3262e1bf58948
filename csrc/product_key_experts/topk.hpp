#pragma once

#include <cstddef>
#include <cstdint>

namespace thrifty {

/// One row of thrifty_product_key_topk, its arguments checked.
void choose_experts(const float* x, const float* y, size_t n, size_t k, float* sums, int64_t* numbers);

}  // namespace thrifty
