#include "../vector/generic.hpp"

#include "experts.hpp"
#include "topk.hpp"

void thrifty::generic::product_key_experts(const ProductKeyExperts& e, size_t first, size_t end) {
  expert_rows<Generic>(e, first, end);
}

void thrifty::generic::product_key_topk(const float* x, const float* y, size_t n, size_t k, float* sums,
                                        int64_t* numbers) {
  choose(x, y, n, k, sums, numbers);
}
