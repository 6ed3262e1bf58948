#include <cstring>

#include "loops.hpp"

namespace thrifty {
namespace {

struct Words {
  uint64_t w[8] = {};

  static Words load(const char* line) {
    Words words;
    std::memcpy(words.w, line, 64);
    return words;
  }
  void operator^=(const Words& other) {
    for (int i = 0; i < 8; ++i) w[i] ^= other.w[i];
  }
  uint64_t fold() const { return w[0] ^ w[1] ^ w[2] ^ w[3] ^ w[4] ^ w[5] ^ w[6] ^ w[7]; }
};

}  // namespace

uint64_t generic::read(const void* bytes, size_t count, int loop) { return read_lines<Words>(bytes, count, loop); }

}  // namespace thrifty
