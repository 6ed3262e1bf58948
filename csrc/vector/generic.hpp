#pragma once

#include <cmath>
#include <cstddef>

#include "scalars.hpp"

namespace thrifty {
namespace {

/// Sixteen floats, whatever the registers: the float kernels are written once over such a class, and every element
/// keeps its lane on every instruction set.
struct Generic {
  /// Blocks of sixteen positions that attention scores at once with few queries.
  static constexpr int kBlocks = 1;
  struct F {
    float lane[16];
  };

  template <class Op>
  static F each(Op op) {
    F r;
    for (int i = 0; i < 16; ++i) r.lane[i] = op(i);
    return r;
  }
  static F set(float v) {
    return each([&](int) { return v; });
  }
  template <class T>
  static F load(const T* from) {
    return each([&](int i) { return widen(from[i]); });
  }
  static F load(const int32_t* from) {
    return each([&](int i) { return float(from[i]); });
  }
  static void store(float* to, F v) {
    for (int i = 0; i < 16; ++i) to[i] = v.lane[i];
  }
  static void store(Half* to, F v) {
    for (int i = 0; i < 16; ++i) to[i] = narrow(v.lane[i]);
  }
  static void store(int8_t* to, F v) {
    for (int i = 0; i < 16; ++i) to[i] = int8_t(std::nearbyint(v.lane[i]));
  }
  /// Sixteen lanes of four bytes; of integer sums, one a lane; and what bytes are multiplied with: codes of a query,
  /// and weights of 0 ... kMostWeight, in kWeightParts, `stride` apart, whose sums `join` puts together.
  struct Bytes {
    const uint8_t* from;
  };
  struct Sums {
    uint32_t lane[16];  // modulo 2^32
  };
  using Code = int16_t;
  static constexpr int kWeightParts = 1;
  static Bytes load_bytes(const uint8_t* from) { return {from}; }
  static Sums no_sums() { return {}; }
  /// sums += the four bytes of a lane times four codes.
  static Sums dot(Sums sums, Bytes bytes, const Code* four) {
    for (int i = 0; i < 64; ++i) sums.lane[i / 4] += uint32_t(bytes.from[i] * four[i % 4]);
    return sums;
  }
  static Sums join(Sums high, Sums) { return high; }
  /// sums - offset.
  static F floats(Sums sums, int32_t offset) {
    return each([&](int i) { return float(int32_t(sums.lane[i] - uint32_t(offset))); });
  }
  static void store_codes(Code* to, F v) {
    for (int i = 0; i < 16; ++i) to[i] = Code(v.lane[i]);
  }
  static void store_weights(Code* to, size_t, F v) { store_codes(to, v); }
  static F add(F a, F b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static F sub(F a, F b) {
    return each([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static F mul(F a, F b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static F div(F a, F b) {
    return each([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  /// a * b + c, fused where the instruction set does that.
  static F madd(F a, F b, F c) {
    return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  /// The larger; b where either is a NaN.
  static F max(F a, F b) {
    return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static F abs(F a) {
    return each([&](int i) { return std::fabs(a.lane[i]); });
  }
  static F round(F a) {
    return each([&](int i) { return std::nearbyint(a.lane[i]); });
  }
  /// a * 2^n for whole n from -126 to 127.
  static F scale(F a, F n) {
    return each([&](int i) {
      const uint32_t bits = uint32_t(int32_t(n.lane[i]) + 127) << 23;
      float power;
      std::memcpy(&power, &bits, 4);
      return a.lane[i] * power;
    });
  }
  /// a where x is negative, else b.
  static F where_negative(F x, F a, F b) {
    return each([&](int i) { return x.lane[i] < 0 ? a.lane[i] : b.lane[i]; });
  }
  /// The first `count` lanes of a, then those of b.
  static F first(size_t count, F a, F b) {
    return each([&](int i) { return size_t(i) < count ? a.lane[i] : b.lane[i]; });
  }
};

}  // namespace
}  // namespace thrifty
