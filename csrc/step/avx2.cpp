#include "../vector/avx2.hpp"

#include "kernels.hpp"

THRIFTY_STEP_KERNELS(avx2, Avx2)
