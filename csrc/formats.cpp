#include "formats.hpp"

#include <atomic>
#include <cstring>

#include "pool.hpp"

namespace thrifty {
namespace {

// Four codes at a time. Bytes are added within their lanes: the sign bit is kept out of the sum, so nothing carries.
uint32_t digits_of(const int8_t* codes) {
  uint32_t word;
  std::memcpy(&word, codes, 4);
  return ((word & 0x7F7F7F7Fu) + 0x01010101u) ^ (word & 0x80808080u);
}

bool are_digits(uint32_t word) { return ((word & 0xFCFCFCFCu) | (word & (word >> 1) & 0x01010101u)) == 0; }

constexpr uint32_t kZeros = 0x01010101u;

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
        digits = digits_of(codes + col);
      } else if (col < cols) {
        int8_t padded[4] = {};
        std::memcpy(padded, codes + col, cols - col);
        digits = digits_of(padded);
      }
      good &= are_digits(digits);
      dword += digits * worth;
    }
    std::memcpy(lane + block * 64, &dword, 4);
  }
  return good;
}

int pack_tiles(const FormatFacts& f, size_t rows, size_t cols, const int8_t* codes, uint8_t* packed) {
  const size_t blocks = round_up(cols, f.col_multiple) / f.col_multiple;
  for (size_t row = 0; row < round_up(rows, 16); ++row) {
    uint8_t* lane = packed + row / 16 * blocks * 64 + row % 16 * 4;
    const auto pack = f.offset == 1 ? pack_row : pack_wide_row;
    // A row of padding has no columns.
    if (!pack(f, row < rows ? codes + row * cols : codes, row < rows ? cols : 0, blocks, lane)) return THRIFTY_BAD_CODE;
  }
  return THRIFTY_OK;
}

int unpack_tiles(const FormatFacts& f, size_t rows, size_t cols, const uint8_t* packed, int8_t* codes) {
  const size_t blocks = round_up(cols, f.col_multiple) / f.col_multiple;
  unsigned byte_values = 1;  // 243 of the 256 in base 3
  for (size_t digit = 0; digit < f.codes_per_byte; ++digit) byte_values *= f.radix;
  const unsigned reciprocal = 65536 / f.radix + 1;  // exact for bytes
  unsigned bad = 0;
  for (size_t row = 0; row < rows; ++row) {
    const uint8_t* lane = packed + row / 16 * blocks * 64 + row % 16 * 4;
    for (size_t block = 0; block < blocks; ++block) {
      for (size_t j = 0; j < 4; ++j) {
        unsigned value = lane[block * 64 + j];
        bad |= unsigned{value >= byte_values};
        for (size_t col = block * f.col_multiple + j; col < (block + 1) * f.col_multiple; col += 4) {
          const unsigned rest = value * reciprocal >> 16;
          const int digit = int(value - rest * f.radix);
          bad |= unsigned{digit > 2 * f.offset};
          if (col < cols) codes[row * cols + col] = int8_t(digit - f.offset);
          value = rest;
        }
      }
    }
  }
  return bad ? THRIFTY_BAD_CODE : THRIFTY_OK;
}

int pack_row_blocks(size_t rows, size_t cols, const int8_t* codes, uint8_t* packed) {
  const size_t quarter = round_up(rows, 4) / 4;
  for (size_t r = 0; r < quarter; ++r) {
    for (size_t col = 0; col < cols; ++col) {
      unsigned byte = 0;
      for (size_t f = 0; f < 4; ++f) {
        const size_t row = f * quarter + r;
        const int code = row < rows ? codes[row * cols + col] : 0;
        if (code < -1 || code > 1) return THRIFTY_BAD_CODE;
        byte |= unsigned(code + 1) << (2 * f);
      }
      packed[r * cols + col] = uint8_t(byte);
    }
  }
  return THRIFTY_OK;
}

int unpack_row_blocks(size_t rows, size_t cols, const uint8_t* packed, int8_t* codes) {
  const size_t quarter = round_up(rows, 4) / 4;
  unsigned bad = 0;
  for (size_t row = 0; row < rows; ++row) {
    const uint8_t* from = packed + row % quarter * cols;
    const size_t shift = row / quarter * 2;
    for (size_t col = 0; col < cols; ++col) {
      const unsigned digit = (unsigned(from[col]) >> shift) & 3;
      bad |= unsigned{digit == 3};
      codes[row * cols + col] = int8_t(int(digit) - 1);
    }
  }
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
  run_ranges(round_up(size_t(rows), 16) / 16, 16 * size_t(cols), size_t{1} << 16, n_threads,
             [&](size_t first, size_t end) {
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

int thrifty_pack(int format, int64_t rows, int64_t cols, const int8_t* codes, uint8_t* packed) {
  if (!valid_format(format)) return THRIFTY_BAD_FORMAT;
  if (!valid_shape(rows, cols) || !codes || !packed) return THRIFTY_BAD_ARGUMENT;
  if (format == THRIFTY_ROW_BLOCK) return pack_row_blocks(size_t(rows), size_t(cols), codes, packed);
  return pack_tiles(kFormats[format], size_t(rows), size_t(cols), codes, packed);
}

int thrifty_unpack(int format, int64_t rows, int64_t cols, const uint8_t* packed, int8_t* codes) {
  if (!valid_format(format)) return THRIFTY_BAD_FORMAT;
  if (!valid_shape(rows, cols) || !codes || !packed) return THRIFTY_BAD_ARGUMENT;
  if (format == THRIFTY_ROW_BLOCK) return unpack_row_blocks(size_t(rows), size_t(cols), packed, codes);
  return unpack_tiles(kFormats[format], size_t(rows), size_t(cols), packed, codes);
}
