#include "../vector/avx512.hpp"

#include "kernels.hpp"

THRIFTY_STEP_KERNELS(avx512, Avx512)
