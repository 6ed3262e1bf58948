#include "formats.hpp"

#include <cstring>

namespace thrifty {
namespace {

// Four codes at a time. Bytes are added within their lanes: the sign bit is kept out of the sum, so nothing carries.
uint32_t digits_of(const int8_t* codes) {
  uint32_t word;
  std::memcpy(&word, codes, 4);
  return ((word & 0x7F7F7F7Fu) + 0x01010101u) ^ (word & 0x80808080u);
}

bool are_digits(uint32_t word) { return ((word & 0xFCFCFCFCu) | (word & (word >> 1) & 0x01010101u)) == 0; }

// One row of one tile. Digits of a byte are `groups` of four columns apart; past the last column the code is 0.
bool pack_row(const FormatFacts& f, const int8_t* codes, size_t cols, size_t blocks, uint8_t* lane) {
  bool good = true;
  for (size_t block = 0; block < blocks; ++block) {
    uint32_t dword = 0, worth = 1;
    for (size_t digit = 0; digit < f.codes_per_byte; ++digit, worth *= f.radix) {
      const size_t col = block * f.col_multiple + 4 * digit;
      uint32_t digits = 0x01010101u;
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
    if (!pack_row(f, codes + row * cols, row < rows ? cols : 0, blocks, lane)) return THRIFTY_BAD_CODE;
  }
  return THRIFTY_OK;
}

int unpack_tiles(const FormatFacts& f, size_t rows, size_t cols, const uint8_t* packed, int8_t* codes) {
  const size_t blocks = round_up(cols, f.col_multiple) / f.col_multiple;
  for (size_t row = 0; row < rows; ++row) {
    const uint8_t* lane = packed + row / 16 * blocks * 64 + row % 16 * 4;
    for (size_t col = 0; col < cols; ++col) {
      const size_t in_block = col % f.col_multiple;
      unsigned value = lane[col / f.col_multiple * 64 + in_block % 4];
      for (size_t digit = in_block / 4; digit > 0; --digit) value /= f.radix;
      const unsigned digit = value % f.radix;
      if (digit > 2) return THRIFTY_BAD_CODE;
      codes[row * cols + col] = int8_t(int(digit) - 1);
    }
  }
  return THRIFTY_OK;
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

}  // namespace
}  // namespace thrifty

using namespace thrifty;

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
