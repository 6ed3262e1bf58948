#pragma once

#include <cstddef>

namespace thrifty {

/// One part of a job: `part` of `parts`, with the caller's context.
using Part = void (*)(const void* context, int part, int parts);

/// Most threads of a job, and most parts that each is dealt.
constexpr int kMostThreads = 256;
constexpr int kMostPartsPerThread = 4;

/// Runs part 0 ... threads * parts_per_thread - 1 on at most `threads` threads, the caller among them, and returns when
/// all are done. Each thread is dealt a contiguous run of parts and takes them in order; one that is done takes from
/// the end of another's run, so a thread that lost its core delays nothing but the part it holds. Where another caller
/// has the pool, or threads cannot be made, the calling thread runs what is left.
void run_parts(int threads, int parts_per_thread, Part part, const void* context);

/// A turn of waiting for another thread.
void relax();

/// Calls `body(begin, end)` on contiguous runs of 0 ... count - 1, where an index is worth `work` units, on at most
/// `n_threads` threads. A run is worth `grain` units or more: below that, waking a thread costs more than it brings.
template <class Body>
void run_ranges(size_t count, size_t work, size_t grain, int n_threads, const Body& body) {
  const size_t parts = count * work / grain < count ? count * work / grain : count;
  size_t threads = n_threads < kMostThreads ? size_t(n_threads > 1 ? n_threads : 1) : size_t{kMostThreads};
  if (threads > parts) threads = parts;
  if (threads <= 1) {
    body(size_t{0}, count);
    return;
  }
  size_t each = parts / threads;
  if (each > size_t{kMostPartsPerThread}) each = kMostPartsPerThread;
  struct Context {
    const Body& body;
    size_t count;
  } context{body, count};
  run_parts(
      int(threads), int(each),
      [](const void* pointer, int part, int of) {
        const auto& c = *static_cast<const Context*>(pointer);
        c.body(c.count * size_t(part) / size_t(of), c.count * (size_t(part) + 1) / size_t(of));
      },
      &context);
}

}  // namespace thrifty
