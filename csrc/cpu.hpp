#pragma once

#include <cstdint>

namespace thrifty {

/// Mask of the instruction sets that the processor and the operating system support, whether built or not.
uint32_t detected_isas();

}  // namespace thrifty
