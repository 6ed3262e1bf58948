#pragma once

#if defined(_MSC_VER)
#include <intrin.h>
#endif

namespace thrifty {
namespace {

/// Asks for the cache line at `address`, which may lie past the buffer: a prefetch does not fault.
inline void prefetch(const void* address) {
#if defined(_MSC_VER) && defined(_M_X64)
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0);
#elif defined(_MSC_VER)
  __prefetch(address);
#else
  __builtin_prefetch(address);
#endif
}

}  // namespace
}  // namespace thrifty
