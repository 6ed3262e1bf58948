#include <arm_neon.h>

#include "../prefetch.hpp"
#include "../vector/generic.hpp"
#include "driver.hpp"

namespace thrifty {
namespace {

/// Four fields of two bits in every byte, and for base 3 the fifth digit apart.
struct Digits {
  uint8x16_t fields;
  uint8x16_t fifth;
};

template <int kDigit>
inline int8x16_t digit(const Digits& d) {
  if constexpr (kDigit == 4) {
    return vreinterpretq_s8_u8(d.fifth);
  } else if constexpr (kDigit == 0) {
    return vreinterpretq_s8_u8(vandq_u8(d.fields, vdupq_n_u8(3)));
  } else {
    return vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(d.fields, 2 * kDigit), vdupq_n_u8(3)));
  }
}

struct I2 {
  static constexpr int kDigits = 4;

  static Digits decode(uint8x16_t bytes) { return {bytes, bytes}; }
};

/// Entry r < 81: the four base-3 digits of r as four fields of two bits.
struct Table {
  uint8_t fields[96];

  constexpr Table() : fields() {
    for (unsigned r = 0; r < 81; ++r) {
      fields[r] = uint8_t(r % 3 | r / 3 % 3 << 2 | r / 9 % 3 << 4 | r / 27 << 6);
    }
  }
};

constexpr Table kTable;

/// byte = 81 d4 + r: two compares give d4 and r, a table look-up in two steps turns r into its digits.
struct Base3 {
  static constexpr int kDigits = 5;

  static Digits decode(uint8x16_t bytes) {
    const uint8x16_t c81 = vdupq_n_u8(81);
    const uint8x16_t one = vcgeq_u8(bytes, c81), two = vcgeq_u8(bytes, vdupq_n_u8(162));
    const uint8x16_t r = vsubq_u8(vsubq_u8(bytes, vandq_u8(one, c81)), vandq_u8(two, c81));
    const uint8x16x4_t low = vld1q_u8_x4(kTable.fields);
    const uint8x16x2_t high = vld1q_u8_x2(kTable.fields + 64);
    const uint8x16_t fields = vqtbx2q_u8(vqtbl4q_u8(low, r), high, vsubq_u8(r, vdupq_n_u8(64)));
    return {fields, count_masks(one, two)};
  }

  /// Masks are -1, so their sum is -d4.
  static uint8x16_t count_masks(uint8x16_t one, uint8x16_t two) { return vsubq_u8(vdupq_n_u8(0), vaddq_u8(one, two)); }
};

/// Products with widening multiply-adds into int16, flushed to int32 before they overflow.
template <class Format>
struct Widening {
  static constexpr int kOffset = 1;
  static constexpr int kDigits = Format::kDigits;
  static constexpr size_t kBlockCols = 4 * kDigits;
  static constexpr int kTiles = 1;
  static constexpr int kGroup = 2;
  // One addition is at most 2 * 128 in magnitude, so 128 of them stay within int16 (only -128 reaches its end).
  static constexpr size_t kFlush = 128 / kDigits;
  static constexpr int kVectors = 4;

  struct Sums {
    int16x8_t low, high;
  };

  static int32_t row_sum(const int8_t* x, size_t count) {
    int32x4_t sum = vdupq_n_s32(0);
    size_t i = 0;
    for (; i + 16 <= count; i += 16) sum = vpadalq_s16(sum, vpaddlq_s8(vld1q_s8(x + i)));
    int32_t total = vaddvq_s32(sum);
    for (; i < count; ++i) total += x[i];
    return total;
  }

  template <int kDigit, int kRows>
  static void add_digits(const Digits* quarters, const int8_t* x, size_t stride, Sums (*acc)[kVectors]) {
    for (int row = 0; row < kRows; ++row) {
      const int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32(load_dword(x + size_t(row) * stride + 4 * kDigit)));
      for (int v = 0; v < kVectors; ++v) {
        const int8x16_t w = digit<kDigit>(quarters[v]);
        acc[row][v].low = vmlal_s8(acc[row][v].low, vget_low_s8(w), vget_low_s8(xs));
        acc[row][v].high = vmlal_high_s8(acc[row][v].high, w, xs);
      }
    }
  }

  template <int kRows>
  static void add_blocks(const uint8_t* packed, const int8_t* x, size_t stride, size_t count,
                         int32x4_t (*wide)[kVectors]) {
    Sums acc[kRows][kVectors];
    for (auto& row : acc)
      for (auto& sums : row) sums = {vdupq_n_s16(0), vdupq_n_s16(0)};
    for (; count > 0; --count, packed += kBlockBytes, x += kBlockCols) {
      prefetch(packed + kPrefetch);
      Digits quarters[kVectors];
      for (int v = 0; v < kVectors; ++v) quarters[v] = Format::decode(vld1q_u8(packed + 16 * v));
      add_digits<0, kRows>(quarters, x, stride, acc);
      add_digits<1, kRows>(quarters, x, stride, acc);
      add_digits<2, kRows>(quarters, x, stride, acc);
      add_digits<3, kRows>(quarters, x, stride, acc);
      if constexpr (kDigits == 5) add_digits<4, kRows>(quarters, x, stride, acc);
    }
    for (int row = 0; row < kRows; ++row) {
      for (int v = 0; v < kVectors; ++v) {
        const int32x4_t sums = vpaddq_s32(vpaddlq_s16(acc[row][v].low), vpaddlq_s16(acc[row][v].high));
        wide[row][v] = vaddq_s32(wide[row][v], sums);
      }
    }
  }

  template <int, int kRows>
  static void product(const TernaryMatmul& m, size_t tile, size_t, size_t token, const int32_t* sums) {
    int32x4_t wide[kRows][kVectors];
    for (auto& row : wide)
      for (auto& sum : row) sum = vdupq_n_s32(0);
    const uint8_t* packed = m.packed + tile * m.blocks * kBlockBytes;
    const int8_t* x = m.x + token * m.x_stride;
    for (size_t block = 0; block < m.blocks; block += kFlush) {
      const size_t count = m.blocks - block < kFlush ? m.blocks - block : kFlush;
      add_blocks<kRows>(packed + block * kBlockBytes, x + block * kBlockCols, m.x_stride, count, wide);
    }
    for (int row = 0; row < kRows; ++row) {
      int32_t products[kTileRows];
      for (int v = 0; v < kVectors; ++v) vst1q_s32(products + 4 * v, wide[row][v]);
      store_tile<Generic>(m, tile, token + size_t(row), products, sums[row]);
    }
  }
};

}  // namespace

namespace neon {

void matmul_i2(const TernaryMatmul& m, size_t first, size_t end) { run_tiles<Widening<I2>>(m, first, end); }
void matmul_base3(const TernaryMatmul& m, size_t first, size_t end) { run_tiles<Widening<Base3>>(m, first, end); }

}  // namespace neon
}  // namespace thrifty
