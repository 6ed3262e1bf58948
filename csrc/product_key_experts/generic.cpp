#include "../vector/generic.hpp"

#include "experts.hpp"

void thrifty::generic::product_key_experts(const ProductKeyExperts& e, size_t first, size_t end) {
  expert_rows<Generic>(e, first, end);
}
