#include "../vector/avx2.hpp"

#include "experts.hpp"
#include "topk.hpp"

void thrifty::avx2::product_key_experts(const ProductKeyExperts& e, size_t first, size_t end) {
  expert_rows<Avx2>(e, first, end);
}

void thrifty::avx2::product_key_topk(const float* x, const float* y, size_t n, size_t k, float* sums,
                                     int64_t* numbers) {
  choose(x, y, n, k, sums, numbers);
}
