#include "../vector/avx2.hpp"

#include "experts.hpp"

void thrifty::avx2::product_key_experts(const ProductKeyExperts& e, size_t first, size_t end) {
  expert_rows<Avx2>(e, first, end);
}
