#include <cstdint>
#include <cstdlib>

#include "thrifty.h"

#if defined(_WIN32)
#include <intrin.h>
#include <malloc.h>
#elif defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr size_t kLine = 64;
#if !defined(_WIN32)
constexpr size_t kHugePage = size_t{2} << 20;
#endif

}  // namespace

void* thrifty_buffer_alloc(size_t bytes) {
#if defined(_WIN32)
  return _aligned_malloc(bytes, kLine);
#else
  // 4 KiB pages cost a stream of weights more in address translation than in transfer.
  const bool large = bytes >= kHugePage;
  void* buffer = nullptr;
  if (posix_memalign(&buffer, large ? kHugePage : kLine, bytes) != 0) return nullptr;
#if defined(__linux__)
  if (large) madvise(buffer, bytes, MADV_HUGEPAGE);
#endif
  return buffer;
#endif
}

void thrifty_use_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__)
  const uintptr_t first = (uintptr_t(memory) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (uintptr_t(memory) + bytes) / kHugePage * kHugePage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

void thrifty_cache_evict(const void* buffer, size_t bytes) {
  const char* line = static_cast<const char*>(buffer);
  for (size_t i = 0; i < bytes; i += kLine) {
#if defined(_M_X64)
    _mm_clflush(line + i);
#elif defined(__x86_64__)
    __builtin_ia32_clflush(line + i);
#elif defined(__aarch64__)
    __asm__ volatile("dc civac, %0" ::"r"(line + i) : "memory");
#else
    (void)line;
#endif
  }
#if defined(__x86_64__)
  __builtin_ia32_mfence();
#endif
}

void thrifty_buffer_free(void* buffer) {
#if defined(_WIN32)
  _aligned_free(buffer);
#else
  std::free(buffer);
#endif
}
