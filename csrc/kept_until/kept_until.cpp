#include <cstring>

#include "../pool.hpp"
#include "thrifty.h"

namespace thrifty {
namespace {

// Key j's place in the order of worth: the score, then the position, so that of equal scores the newer is the better.
// No two keys compare equal.
uint64_t worth(float score, size_t j) {
  score += 0.0f;  // -0 is 0
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  bits ^= bits >> 31 ? 0xFFFFFFFFu : 0x80000000u;
  return uint64_t{bits} << 32 | j;
}

// Puts `value` into a heap whose root is least, from the hole at `i` downwards.
void sift_down(uint64_t* heap, size_t size, size_t i, uint64_t value) {
  for (size_t child = 2 * i + 1; child < size; child = 2 * i + 1) {
    if (child + 1 < size && heap[child + 1] < heap[child]) ++child;
    if (value < heap[child]) break;
    heap[i] = heap[child];
    i = child;
  }
  heap[i] = value;
}

void kept_until(const float* scores, size_t keys, size_t window, uint64_t* heap, int64_t* ends) {
  for (size_t j = 0; j < keys; ++j) ends[j] = int64_t(keys);
  if (keys <= window) return;
  for (size_t j = 0; j < window; ++j) heap[j] = worth(scores[j], j);
  for (size_t i = window / 2; i-- > 0;) sift_down(heap, window, i, heap[i]);
  for (size_t j = window; j < keys; ++j) {
    const uint64_t value = worth(scores[j], j);
    if (value < heap[0]) {
      ends[j] = int64_t(j);
      continue;
    }
    ends[heap[0] & 0xFFFFFFFFu] = int64_t(j);
    sift_down(heap, window, 0, value);
  }
}

}  // namespace
}  // namespace thrifty

int thrifty_kept_until(const float* scores, int64_t heads, int64_t keys, int64_t window, uint64_t* scratch,
                       int64_t* ends, int n_threads) {
  if (!scores || !scratch || !ends || heads < 0 || keys < 0 || keys > INT64_C(0xFFFFFFFF) || window < 1)
    return THRIFTY_BAD_ARGUMENT;
  const size_t n = size_t(keys), w = size_t(window < keys ? window : keys);
  thrifty::run_ranges(size_t(heads), n, size_t{1} << 12, n_threads, [&](size_t first, size_t end) {
    for (size_t h = first; h < end; ++h) thrifty::kept_until(scores + h * n, n, w, scratch + h * w, ends + h * n);
  });
  return THRIFTY_OK;
}
