#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace thrifty {
namespace {

// Codes -1, 0, 1 and digits 0, 1, 2, one in each byte of a word. Nothing carries from a byte into the next.
template <class Word>
constexpr Word kOnes = Word(~Word{0}) / 255;

/// A word of `bytes` bytes in memory, and zeros.
template <class Word, size_t bytes = sizeof(Word)>
Word load_word(const void* from) {
  Word word = 0;
  std::memcpy(&word, from, bytes);
  return word;
}

/// digit = code + 1. The sign bit is kept out of the sum.
template <class Word>
constexpr Word digits_of(Word codes) {
  constexpr Word ones = kOnes<Word>;
  return ((codes & 0x7F * ones) + ones) ^ (codes & 0x80 * ones);
}

/// code = digit - 1, of digits up to 3.
template <class Word>
constexpr Word codes_of(Word digits) {
  constexpr Word ones = kOnes<Word>;
  return ((digits | 0x80 * ones) - ones) ^ 0x80 * ones;
}

/// Bits that are set where a byte is no digit.
template <class Word>
constexpr Word no_digits(Word word) {
  constexpr Word ones = kOnes<Word>;
  return (word & 0xFC * ones) | (word & word >> 1 & ones);
}

}  // namespace
}  // namespace thrifty
