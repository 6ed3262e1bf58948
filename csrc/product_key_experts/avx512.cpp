#include "../vector/avx512.hpp"

#include "experts.hpp"

void thrifty::avx512::product_key_experts(const ProductKeyExperts& e, size_t first, size_t end) {
  expert_rows<Avx512>(e, first, end);
}
