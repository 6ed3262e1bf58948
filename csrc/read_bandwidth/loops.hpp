#pragma once

#include <cstddef>
#include <cstdint>

#include "../kernels.hpp"
#include "../prefetch.hpp"

namespace thrifty {
namespace {

/// Reads `lines` cache lines through `Vector`, which has `load(line)`, `operator^=` and `fold()`.
template <class Vector>
uint64_t read_linear(const char* bytes, size_t lines) {
  Vector a, b, c, d;
  size_t i = 0;
  for (; i + 4 <= lines; i += 4) {
    a ^= Vector::load(bytes + 64 * i);
    b ^= Vector::load(bytes + 64 * i + 64);
    c ^= Vector::load(bytes + 64 * i + 128);
    d ^= Vector::load(bytes + 64 * i + 192);
  }
  for (; i < lines; ++i) a ^= Vector::load(bytes + 64 * i);
  return a.fold() ^ b.fold() ^ c.fold() ^ d.fold();
}

template <class Vector>
uint64_t read_prefetched(const char* bytes, size_t lines) {
  Vector a, b, c, d;
  size_t i = 0;
  for (; i + 4 <= lines; i += 4) {
    const char* line = bytes + 64 * i;
    for (int ahead = 0; ahead < 4; ++ahead) prefetch(line + kPrefetch + 64 * ahead);
    a ^= Vector::load(line);
    b ^= Vector::load(line + 64);
    c ^= Vector::load(line + 128);
    d ^= Vector::load(line + 192);
  }
  for (; i < lines; ++i) a ^= Vector::load(bytes + 64 * i);
  return a.fold() ^ b.fold() ^ c.fold() ^ d.fold();
}

template <class Vector>
uint64_t read_four_streams(const char* bytes, size_t lines) {
  Vector a, b, c, d;
  const size_t quarter = lines / 4;
  const char* p[4] = {bytes, bytes + 64 * quarter, bytes + 128 * quarter, bytes + 192 * quarter};
  for (size_t i = 0; i < quarter; ++i) {
    for (const char* stream : p) prefetch(stream + 64 * i + kPrefetch);
    a ^= Vector::load(p[0] + 64 * i);
    b ^= Vector::load(p[1] + 64 * i);
    c ^= Vector::load(p[2] + 64 * i);
    d ^= Vector::load(p[3] + 64 * i);
  }
  for (size_t i = 4 * quarter; i < lines; ++i) a ^= Vector::load(bytes + 64 * i);
  return a.fold() ^ b.fold() ^ c.fold() ^ d.fold();
}

template <class Vector>
uint64_t read_lines(const void* bytes, size_t count, int loop) {
  const auto* from = static_cast<const char*>(bytes);
  if (loop == 1) return read_prefetched<Vector>(from, count / 64);
  if (loop == 2) return read_four_streams<Vector>(from, count / 64);
  return read_linear<Vector>(from, count / 64);
}

}  // namespace
}  // namespace thrifty
