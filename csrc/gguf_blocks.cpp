#include "gguf_blocks.hpp"

#include <array>
#include <atomic>
#include <cmath>

#include "digits.hpp"
#include "formats.hpp"
#include "pool.hpp"

namespace thrifty {
namespace {

struct BlockFacts {
  size_t weights;
  size_t bytes;
};
/// In the order of enum thrifty_gguf; src/thrifty/spec/gguf_blocks.py is their source.
constexpr BlockFacts kBlocks[THRIFTY_GGUF_COUNT] = {{256, 54}, {256, 66}, {128, 32}};

constexpr size_t kGrain = size_t{1} << 16;

using Word = uint64_t;

/// What was met on the way: bits of words that are no digits, and of codes that are not 0.
struct Seen {
  Word bad = 0, codes = 0;
};

// 128 weights in 32 bytes: weight m + 32 f in byte m, shifted by the f-th of four.
template <int... shifts>
void encode_two_bits(const int8_t* codes, uint8_t* out, Seen& seen) {
  for (size_t at = 0; at < 32; at += sizeof(Word)) {
    const int8_t* from = codes + at - 32;
    Word bytes = 0;
    for (const int shift : {shifts...}) {
      const Word word = load_word<Word>(from += 32), digits = digits_of(word);
      bytes |= digits << shift;
      seen.bad |= no_digits(digits);
      seen.codes |= word;
    }
    std::memcpy(out + at, &bytes, sizeof bytes);
  }
}

template <int... shifts>
void decode_two_bits(const uint8_t* from, int8_t* codes, Seen& seen) {
  for (const int shift : {shifts...}) {
    for (size_t at = 0; at < 32; at += sizeof(Word)) {
      const Word digits = load_word<Word>(from + at) >> shift & 3 * kOnes<Word>, word = codes_of(digits);
      std::memcpy(codes + at, &word, sizeof word);
      seen.bad |= no_digits(digits);
      seen.codes |= word;
    }
    codes += 32;
  }
}

/// The byte of five base-3 digits, whose first digit is floor(3 byte / 256), and which bytes are none.
struct Base3Bytes {
  std::array<uint8_t, 243> of{};
  std::array<uint8_t, 256> none{};
};
constexpr Base3Bytes base3_bytes() {
  Base3Bytes result;
  for (auto& none : result.none) none = 1;
  for (unsigned number = 0; number < 243; ++number) {
    const unsigned byte = (number * 256 + 242) / 243;
    result.of[number] = uint8_t(byte);
    result.none[byte] = 0;
  }
  return result;
}
constexpr Base3Bytes kBase3 = base3_bytes();

// `width` bytes of five digits, or of four with a 0 behind: weight m + width * f is digit f of byte m.
template <size_t width, size_t digits, size_t step>
void encode_base3(const int8_t* codes, uint8_t* out, Seen& seen) {
  for (size_t at = 0; at < width; at += step) {
    Word numbers = 0;
    for (size_t f = 0; f < digits; ++f) {
      const Word word = load_word<Word, step>(codes + width * f + at), next = digits_of(word);
      numbers = numbers * 3 + next;
      seen.bad |= no_digits(next);
      seen.codes |= word;
    }
    if (digits == 4) numbers *= 3;
    uint8_t bytes[sizeof(Word)];
    std::memcpy(bytes, &numbers, sizeof bytes);
    for (size_t i = 0; i < step; ++i) out[at + i] = bytes[i] < 243 ? kBase3.of[bytes[i]] : 0;
  }
}

template <size_t width, size_t digits>
void decode_base3(const uint8_t* from, int8_t* codes, Seen& seen) {
  uint8_t rest[width];
  for (size_t i = 0; i < width; ++i) {
    rest[i] = from[i];
    seen.bad |= kBase3.none[from[i]];
  }
  int any = 0;
  for (size_t f = 0; f < digits; ++f) {
    for (size_t i = 0; i < width; ++i) {
      const uint16_t tripled = uint16_t(rest[i] * 3);
      rest[i] = uint8_t(tripled);
      codes[width * f + i] = int8_t((tripled >> 8) - 1);
      any |= codes[width * f + i];
    }
  }
  seen.codes |= Word(any != 0);
}

void encode_block(int kind, const int8_t* codes, uint8_t* out, Seen& seen) {
  if (kind == THRIFTY_TQ1_0) {
    encode_base3<32, 5, 8>(codes, out, seen);
    encode_base3<16, 5, 8>(codes + 160, out + 32, seen);
    encode_base3<4, 4, 4>(codes + 240, out + 48, seen);
  } else if (kind == THRIFTY_TQ2_0) {
    encode_two_bits<0, 2, 4, 6>(codes, out, seen);
    encode_two_bits<0, 2, 4, 6>(codes + 128, out + 32, seen);
  } else {
    encode_two_bits<6, 4, 2, 0>(codes, out, seen);
  }
}

void decode_block(int kind, const uint8_t* from, int8_t* codes, Seen& seen) {
  if (kind == THRIFTY_TQ1_0) {
    decode_base3<32, 5>(from, codes, seen);
    decode_base3<16, 5>(from + 32, codes + 160, seen);
    decode_base3<4, 4>(from + 48, codes + 240, seen);
  } else if (kind == THRIFTY_TQ2_0) {
    decode_two_bits<0, 2, 4, 6>(from, codes, seen);
    decode_two_bits<0, 2, 4, 6>(from + 32, codes + 128, seen);
  } else {
    decode_two_bits<6, 4, 2, 0>(from, codes, seen);
  }
}

bool valid_blocks(int64_t rows, int64_t cols, size_t weights) {
  return valid_shape(rows, cols) && size_t(cols) % weights == 0;
}

bool positive(float scale) { return scale > 0 && scale < INFINITY; }

// False where a value is not finite or the scale is beyond float16.
template <class T>
bool quantize_block(const T* values, Q8Block& out) {
  float magnitudes[kQ8Weights];
  int32_t signs[kQ8Weights];
  int32_t most = 0;
  for (size_t i = 0; i < kQ8Weights; ++i) {
    const float value = widen(values[i]);
    int32_t bits;
    std::memcpy(&bits, &value, 4);
    signs[i] = bits >> 31;
    bits &= 0x7FFFFFFF;
    std::memcpy(&magnitudes[i], &bits, 4);
    most = most > bits ? most : bits;  // in the order of the floats
  }
  if (most >= 0x7F800000) return false;
  float largest;
  std::memcpy(&largest, &most, 4);
  const float d = largest / 127.0f;
  const Half stored = narrow(d);
  if (stored.bits >= 0x7C00) return false;
  const float reciprocal = 1.0f / d;
  const float inverse = reciprocal <= 3.402823466e38f ? reciprocal : 0.0f;
  std::memcpy(out.scale, &stored, 2);
  for (size_t i = 0; i < kQ8Weights; ++i) {
    const float scaled = magnitudes[i] * inverse;
    int32_t code = int32_t(scaled);
    code += int32_t(scaled - float(code) >= 0.5f);
    out.codes[i] = int8_t((code ^ signs[i]) - signs[i]);
  }
  return true;
}

template <class T>
int quantize(const T* values, size_t blocks, Q8Block* data, int n_threads) {
  std::atomic<bool> good{true};
  run_ranges(blocks, kQ8Weights, kGrain / 4, n_threads, [&](size_t first, size_t end) {
    bool all = true;
    for (size_t block = first; block < end; ++block) {
      all &= quantize_block(values + block * kQ8Weights, data[block]);
    }
    if (!all) good = false;
  });
  return good ? THRIFTY_OK : THRIFTY_BAD_CODE;
}

}  // namespace
}  // namespace thrifty

using namespace thrifty;

int thrifty_gguf_encode(int kind, const int8_t* codes, int64_t rows, int64_t cols, float scale, uint8_t* data,
                        int n_threads) {
  if (kind < 0 || kind >= THRIFTY_GGUF_COUNT) return THRIFTY_BAD_FORMAT;
  const BlockFacts f = kBlocks[kind];
  if (!valid_blocks(rows, cols, f.weights) || !codes || !data || !positive(scale)) return THRIFTY_BAD_ARGUMENT;
  const bool whole = kind == THRIFTY_I2_S;  // one scale for the tensor
  const Half stored = narrow(scale);
  if (!whole && !positive(widen(stored))) return THRIFTY_BAD_ARGUMENT;
  const size_t blocks = size_t(rows) * (size_t(cols) / f.weights);
  std::atomic<Word> bad{0};
  run_ranges(blocks, f.weights, kGrain, n_threads, [&](size_t first, size_t end) {
    Word found = 0;
    for (size_t block = first; block < end; ++block) {
      uint8_t* out = data + block * f.bytes;
      Seen seen;
      encode_block(kind, codes + block * f.weights, out, seen);
      const Half own = {seen.codes ? stored.bits : uint16_t{0}};
      if (!whole) std::memcpy(out + f.bytes - 2, &own, 2);
      found |= seen.bad;
    }
    bad |= found;
  });
  if (whole) {
    std::memset(data + blocks * f.bytes, 0, THRIFTY_I2_S_TAIL);
    std::memcpy(data + blocks * f.bytes, &scale, 4);
  }
  return bad ? THRIFTY_BAD_CODE : THRIFTY_OK;
}

int thrifty_gguf_decode(int kind, const uint8_t* data, int64_t rows, int64_t cols, int8_t* codes, float* scales,
                        int n_threads) {
  if (kind < 0 || kind >= THRIFTY_GGUF_COUNT) return THRIFTY_BAD_FORMAT;
  const BlockFacts f = kBlocks[kind];
  if (!valid_blocks(rows, cols, f.weights) || !data || !codes || !scales) return THRIFTY_BAD_ARGUMENT;
  const size_t blocks = size_t(rows) * (size_t(cols) / f.weights);
  const bool whole = kind == THRIFTY_I2_S;
  if (whole) std::memcpy(scales, data + blocks * f.bytes, 4);
  std::atomic<Word> bad{0};
  run_ranges(blocks, f.weights, kGrain, n_threads, [&](size_t first, size_t end) {
    Word found = 0;
    for (size_t block = first; block < end; ++block) {
      const uint8_t* from = data + block * f.bytes;
      int8_t* to = codes + block * f.weights;
      Seen seen;
      decode_block(kind, from, to, seen);
      found |= seen.bad;
      float scale = scales[0];
      if (!whole) {
        Half stored;
        std::memcpy(&stored, from + f.bytes - 2, 2);
        scale = widen(stored);
        scales[block] = seen.codes ? scale : 0.0f;
      }
      if (scale == 0) std::memset(to, 0, f.weights);
      found |= Word(!(scale >= 0 && scale < INFINITY));
    }
    bad |= found;
  });
  return bad ? THRIFTY_BAD_CODE : THRIFTY_OK;
}

int thrifty_quantize_q8_0(const void* values, int dtype, int64_t rows, int64_t cols, uint8_t* bytes, int n_threads) {
  if (!valid_blocks(rows, cols, kQ8Weights) || !values || !bytes) return THRIFTY_BAD_ARGUMENT;
  const size_t blocks = size_t(rows) * (size_t(cols) / kQ8Weights);
  Q8Block* data = reinterpret_cast<Q8Block*>(bytes);
  switch (dtype) {
    case THRIFTY_F32: return quantize(static_cast<const float*>(values), blocks, data, n_threads);
    case THRIFTY_BF16: return quantize(static_cast<const Bfloat*>(values), blocks, data, n_threads);
    case THRIFTY_F16: return quantize(static_cast<const Half*>(values), blocks, data, n_threads);
    default: return THRIFTY_BAD_FORMAT;
  }
}

int thrifty_dequantize_q8_0(const uint8_t* data, int64_t rows, int64_t cols, float* values, int n_threads) {
  if (!valid_blocks(rows, cols, kQ8Weights) || !data || !values) return THRIFTY_BAD_ARGUMENT;
  const size_t blocks = size_t(rows) * (size_t(cols) / kQ8Weights);
  run_ranges(blocks, kQ8Weights, kGrain, n_threads, [&](size_t first, size_t end) {
    dequantize_q8_0(reinterpret_cast<const Q8Block*>(data) + first, (end - first) * kQ8Weights,
                    values + first * kQ8Weights);
  });
  return THRIFTY_OK;
}
