#pragma once

#include "../kernels.hpp"

namespace thrifty {
namespace {

/// The numbers and arrays of an op.
struct Fields {
  const thrifty_op& op;

  size_t n(int i) const { return size_t(op.n[i]); }
  float* p(int i) const { return static_cast<float*>(op.p[i]); }
};

inline Heads heads_of(const thrifty_op& op) {
  const Fields f{op};
  return {f.n(0), f.n(1), f.n(2), f.n(3), int(op.n[4])};
}

inline RopeCache rope_cache_of(const thrifty_op& op, const thrifty_batch& batch) {
  const Fields f{op};
  return {heads_of(op), &batch, f.p(0), f.n(5), f.n(6), f.n(7), f.p(1), f.p(2)};
}

inline Mlgru mlgru_of(const thrifty_op& op, const thrifty_batch& batch, size_t rows) {
  const Fields f{op};
  return {&batch, rows, f.n(0), f.n(1), f.n(2), f.n(3), f.p(0), f.p(1), f.p(2), f.p(3), f.p(4), f.n(4) != 0};
}

inline Ssd ssd_of(const thrifty_op& op, const thrifty_batch& batch, size_t rows) {
  const Fields f{op};
  return {&batch, rows,   f.n(0), f.n(1), f.n(2), f.n(3), f.n(4), f.n(5),
          f.n(6), f.n(7), f.p(0), f.p(1), f.p(2), f.p(3), f.p(4), f.p(5)};
}

}  // namespace
}  // namespace thrifty
