#pragma once

#include <cstddef>

#if defined(_MSC_VER)
#include <intrin.h>
#endif

namespace thrifty {
namespace {

/// Distance of the software prefetch: from memory, and past the page border where the hardware prefetcher stops.
constexpr size_t kPrefetch = 4096;
constexpr size_t kPage = 4096;

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

/// The same into the second cache only: it does not hold one of the few buffers of the first until memory answers.
inline void prefetch_far(const void* address) {
#if defined(_MSC_VER) && defined(_M_X64)
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T1);
#elif defined(_MSC_VER)
  __prefetch(address);
#else
  __builtin_prefetch(address, 0, 2);
#endif
}

/// The same for a line that will be written.
inline void prefetch_write(const void* address) {
#if defined(_MSC_VER) && defined(_M_X64)
  _m_prefetchw(address);
#elif defined(_MSC_VER)
  __prefetch(address);
#else
  __builtin_prefetch(address, 1);
#endif
}

}  // namespace
}  // namespace thrifty
