#pragma once

#include <immintrin.h>

#include <cstdint>

namespace thrifty {
namespace {

/// Registers 6 and 7 are full tiles of 16 rows of 64 bytes, the others the first `count` rows of one.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};

  constexpr TileConfig(uint8_t count = 16) {
    for (int i = 0; i < 8; ++i) rows[i] = i < 6 ? count : 16;
  }
};
static_assert(sizeof(TileConfig) == 64, "as the processor reads it");

/// By count. Constant, because GCC 12 declares only 8 bytes as read by the instruction and may drop stores to the
/// others.
struct TileConfigs {
  TileConfig rows[17] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
};
constexpr TileConfigs kTileConfigs;

/// Tile loads are assembly that does not say what it reads.
inline void publish(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

}  // namespace
}  // namespace thrifty
