#include "formats.hpp"

#include <atomic>
#include <cstring>

#include "digits.hpp"
#include "pool.hpp"

namespace thrifty {
namespace {

constexpr uint32_t kZeros = kOnes<uint32_t>;
constexpr size_t kGrain = size_t{1} << 16;

// The same for formats whose digits reach `most` and whose code 0 is digit `offset`.
bool pack_wide_row(const FormatFacts& f, const int8_t* codes, size_t cols, size_t blocks, uint8_t* lane) {
  bool good = true;
  for (size_t block = 0; block < blocks; ++block) {
    for (size_t j = 0; j < 4; ++j) {
      unsigned byte = 0, worth = 1;
      for (size_t digit = 0; digit < f.codes_per_byte; ++digit, worth *= f.radix) {
        const size_t col = block * f.col_multiple + 4 * digit + j;
        const int code = col < cols ? codes[col] : 0;
        good &= code >= -f.offset && code <= f.offset;
        byte += unsigned(code + f.offset) * worth;
      }
      lane[block * 64 + j] = uint8_t(byte);
    }
  }
  return good;
}

// One row of one tile. Digits of a byte are `groups` of four columns apart; past the last column the code is 0.
bool pack_row(const FormatFacts& f, const int8_t* codes, size_t cols, size_t blocks, uint8_t* lane) {
  bool good = true;
  for (size_t block = 0; block < blocks; ++block) {
    uint32_t dword = 0, worth = 1;
    for (size_t digit = 0; digit < f.codes_per_byte; ++digit, worth *= f.radix) {
      const size_t col = block * f.col_multiple + 4 * digit;
      uint32_t digits = kZeros;
      if (col + 4 <= cols) {
        digits = digits_of(load_word<uint32_t>(codes + col));
      } else if (col < cols) {
        int8_t padded[4] = {};
        std::memcpy(padded, codes + col, cols - col);
        digits = digits_of(load_word<uint32_t>(padded));
      }
      good &= no_digits(digits) == 0;
      dword += digits * worth;
    }
    std::memcpy(lane + block * 64, &dword, 4);
  }
  return good;
}

int pack_tiles(const FormatFacts& f, size_t rows, size_t cols, const int8_t* codes, uint8_t* packed, int n_threads) {
  const size_t blocks = round_up(cols, f.col_multiple) / f.col_multiple;
  const auto pack = f.offset == 1 ? pack_row : pack_wide_row;
  std::atomic<bool> good{true};
  run_ranges(round_up(rows, 16) / 16, 16 * cols, kGrain, n_threads, [&](size_t first, size_t end) {
    bool all = true;
    for (size_t row = 16 * first; row < 16 * end; ++row) {
      uint8_t* lane = packed + row / 16 * blocks * 64 + row % 16 * 4;
      // A row of padding has no columns.
      all &= pack(f, row < rows ? codes + row * cols : codes, row < rows ? cols : 0, blocks, lane);
    }
    if (!all) good = false;
  });
  return good ? THRIFTY_OK : THRIFTY_BAD_CODE;
}

// One row out of its lane of a tile. True where a byte or digit stands for no code.
bool unpack_row(const FormatFacts& f, const uint8_t* lane, size_t cols, size_t blocks, int8_t* codes) {
  unsigned byte_values = 1;  // 243 of the 256 in base 3
  for (size_t digit = 0; digit < f.codes_per_byte; ++digit) byte_values *= f.radix;
  const unsigned reciprocal = 65536 / f.radix + 1;  // exact for bytes
  unsigned bad = 0;
  for (size_t block = 0; block < blocks; ++block) {
    for (size_t j = 0; j < 4; ++j) {
      unsigned value = lane[block * 64 + j];
      bad |= unsigned{value >= byte_values};
      for (size_t col = block * f.col_multiple + j; col < (block + 1) * f.col_multiple; col += 4) {
        const unsigned rest = value * reciprocal >> 16;
        const int digit = int(value - rest * f.radix);
        bad |= unsigned{digit > 2 * f.offset};
        if (col < cols) codes[col] = int8_t(digit - f.offset);
        value = rest;
      }
    }
  }
  return bad != 0;
}

int unpack_tiles(const FormatFacts& f, size_t rows, size_t cols, const uint8_t* packed, int8_t* codes, int n_threads) {
  const size_t blocks = round_up(cols, f.col_multiple) / f.col_multiple;
  std::atomic<bool> bad{false};
  run_ranges(rows, cols, kGrain, n_threads, [&](size_t first, size_t end) {
    bool found = false;
    for (size_t row = first; row < end; ++row) {
      const uint8_t* lane = packed + row / 16 * blocks * 64 + row % 16 * 4;
      found |= unpack_row(f, lane, cols, blocks, codes + row * cols);
    }
    if (found) bad = true;
  });
  return bad ? THRIFTY_BAD_CODE : THRIFTY_OK;
}

// `n` bytes, at most eight, as digits of a word; code 0 behind them, and everywhere for NULL.
uint64_t some_digits(const int8_t* codes, size_t n) {
  uint64_t word = 0;
  if (codes != nullptr) std::memcpy(&word, codes, n);
  return digits_of(word);
}

// One row of bytes of a row_block matrix from its four rows of codes, NULL for those of padding.
uint64_t pack_quarter(const int8_t* const* codes, size_t cols, uint8_t* packed) {
  uint64_t bad = 0;
  for (size_t col = 0; col < cols; col += 8) {
    const size_t n = cols - col < 8 ? cols - col : 8;
    uint64_t bytes = 0;
    for (size_t f = 0; f < 4; ++f) {
      const int8_t* from = codes[f] == nullptr ? nullptr : codes[f] + col;
      const uint64_t digits = n == 8 ? some_digits(from, 8) : some_digits(from, n);
      bad |= no_digits(digits);
      bytes |= digits << 2 * f;
    }
    std::memcpy(packed + col, &bytes, n);
  }
  return bad;
}

int pack_row_blocks(size_t rows, size_t cols, const int8_t* codes, uint8_t* packed, int n_threads) {
  const size_t quarter = round_up(rows, 4) / 4;
  std::atomic<uint64_t> bad{0};
  run_ranges(quarter, 4 * cols, kGrain, n_threads, [&](size_t first, size_t end) {
    uint64_t found = 0;
    for (size_t r = first; r < end; ++r) {
      const int8_t* from[4];
      for (size_t f = 0; f < 4; ++f) from[f] = f * quarter + r < rows ? codes + (f * quarter + r) * cols : nullptr;
      found |= pack_quarter(from, cols, packed + r * cols);
    }
    bad |= found;
  });
  return bad ? THRIFTY_BAD_CODE : THRIFTY_OK;
}

uint64_t unpack_quarter(const uint8_t* packed, size_t shift, size_t cols, int8_t* codes) {
  uint64_t bad = 0;
  size_t col = 0;
  for (; col + 8 <= cols; col += 8) {
    const uint64_t digits = load_word<uint64_t>(packed + col) >> shift & 3 * kOnes<uint64_t>, word = codes_of(digits);
    bad |= no_digits(digits);
    std::memcpy(codes + col, &word, 8);
  }
  for (; col < cols; ++col) {
    const unsigned digit = unsigned(packed[col]) >> shift & 3;
    bad |= uint64_t{digit == 3};
    codes[col] = int8_t(int(digit) - 1);
  }
  return bad;
}

int unpack_row_blocks(size_t rows, size_t cols, const uint8_t* packed, int8_t* codes, int n_threads) {
  const size_t quarter = round_up(rows, 4) / 4;
  std::atomic<uint64_t> bad{0};
  run_ranges(quarter, 4 * cols, kGrain, n_threads, [&](size_t first, size_t end) {
    uint64_t found = 0;
    for (size_t r = first; r < end; ++r) {
      for (size_t row = r; row < rows; row += quarter) {
        found |= unpack_quarter(packed + r * cols, row / quarter * 2, cols, codes + row * cols);
      }
    }
    bad |= found;
  });
  return bad ? THRIFTY_BAD_CODE : THRIFTY_OK;
}

// One row of a row_block matrix into its lane of a tile; null for a row of padding. Returns bits that are set where a
// digit was 3.
uint32_t repack_row(const FormatFacts& f, const uint8_t* from, unsigned shift, size_t cols, size_t blocks,
                    uint8_t* lane) {
  uint32_t bad = 0;
  for (size_t block = 0; block < blocks; ++block) {
    uint32_t dword = 0, worth = 1;
    for (size_t digit = 0; digit < f.codes_per_byte; ++digit, worth *= f.radix) {
      const size_t col = block * f.col_multiple + 4 * digit;
      uint32_t digits = kZeros;
      if (from != nullptr && col + 4 <= cols) {
        std::memcpy(&digits, from + col, 4);
        digits = digits >> shift & 0x03030303u;
      } else if (from != nullptr && col < cols) {
        uint8_t padded[4] = {1, 1, 1, 1};
        for (size_t i = 0; col + i < cols; ++i) padded[i] = from[col + i] >> shift & 3;
        std::memcpy(&digits, padded, 4);
      }
      bad |= digits & digits >> 1 & kZeros;
      dword += digits * worth;
    }
    std::memcpy(lane + block * 64, &dword, 4);
  }
  return bad;
}

}  // namespace
}  // namespace thrifty

using namespace thrifty;

int thrifty_repack(int format, const uint8_t* row_block, int64_t rows, int64_t cols, uint8_t* packed,
                   int64_t first_tile, int64_t tile_step, int n_threads) {
  if (format != THRIFTY_I2 && format != THRIFTY_BASE3) return THRIFTY_BAD_FORMAT;
  if (!valid_shape(rows, cols) || !row_block || !packed || first_tile < 0 || tile_step < 1) return THRIFTY_BAD_ARGUMENT;
  const FormatFacts& f = kFormats[format];
  const size_t blocks = round_up(size_t(cols), f.col_multiple) / f.col_multiple;
  const size_t quarter = round_up(size_t(rows), 4) / 4;
  std::atomic<uint32_t> bad{0};
  run_ranges(round_up(size_t(rows), 16) / 16, 16 * size_t(cols), kGrain, n_threads, [&](size_t first, size_t end) {
    uint32_t found = 0;
    for (size_t row = 16 * first; row < 16 * end; ++row) {
      const size_t tile = size_t(first_tile) + row / 16 * size_t(tile_step);
      const uint8_t* from = row < size_t(rows) ? row_block + row % quarter * size_t(cols) : nullptr;
      found |= repack_row(f, from, unsigned(row / quarter * 2), size_t(cols), blocks,
                          packed + tile * blocks * 64 + row % 16 * 4);
    }
    bad |= found;
  });
  return bad ? THRIFTY_BAD_CODE : THRIFTY_OK;
}

size_t thrifty_pack_size(int format, int64_t rows, int64_t cols) {
  if (!valid_format(format) || !valid_shape(rows, cols)) return 0;
  const FormatFacts& f = kFormats[format];
  return round_up(size_t(rows), f.row_multiple) * round_up(size_t(cols), f.col_multiple) / f.codes_per_byte;
}

int thrifty_pack(int format, int64_t rows, int64_t cols, const int8_t* codes, uint8_t* packed, int n_threads) {
  if (!valid_format(format)) return THRIFTY_BAD_FORMAT;
  if (!valid_shape(rows, cols) || !codes || !packed) return THRIFTY_BAD_ARGUMENT;
  if (format == THRIFTY_ROW_BLOCK) return pack_row_blocks(size_t(rows), size_t(cols), codes, packed, n_threads);
  return pack_tiles(kFormats[format], size_t(rows), size_t(cols), codes, packed, n_threads);
}

int thrifty_unpack(int format, int64_t rows, int64_t cols, const uint8_t* packed, int8_t* codes, int n_threads) {
  if (!valid_format(format)) return THRIFTY_BAD_FORMAT;
  if (!valid_shape(rows, cols) || !codes || !packed) return THRIFTY_BAD_ARGUMENT;
  if (format == THRIFTY_ROW_BLOCK) return unpack_row_blocks(size_t(rows), size_t(cols), packed, codes, n_threads);
  return unpack_tiles(kFormats[format], size_t(rows), size_t(cols), packed, codes, n_threads);
}
