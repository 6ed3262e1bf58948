#pragma once

#include <cstddef>

namespace thrifty {

/// One part of a job: `part` of `parts`, with the caller's context.
using Part = void (*)(const void* context, int part, int parts);

/// Runs part 0 ... parts - 1, the first on the calling thread, and returns when all are done. Where another caller
/// holds the pool, or threads cannot be made, the calling thread runs every part.
void run_parts(int parts, Part part, const void* context);

/// Calls `body(begin, end)` on contiguous runs of 0 ... count - 1, at most `n_threads` of them, each worth `grain`
/// units of work or more where an index is worth `work_per_index`: below that, waking a thread costs more than it
/// brings.
template <class Body>
void run_ranges(size_t count, size_t work_per_index, size_t grain, int n_threads, const Body& body) {
  const size_t most = count * work_per_index / grain + 1;
  size_t parts = n_threads > 1 ? size_t(n_threads) : 1;
  if (parts > most) parts = most;
  if (parts > count) parts = count;
  if (parts <= 1) {
    body(size_t{0}, count);
    return;
  }
  struct Context {
    const Body& body;
    size_t count;
  } context{body, count};
  run_parts(
      int(parts),
      [](const void* pointer, int part, int of) {
        const auto& c = *static_cast<const Context*>(pointer);
        c.body(c.count * size_t(part) / size_t(of), c.count * (size_t(part) + 1) / size_t(of));
      },
      &context);
}

}  // namespace thrifty
