#include "../vector/generic.hpp"

#include "kernels.hpp"

THRIFTY_STEP_KERNELS(generic, Generic)
