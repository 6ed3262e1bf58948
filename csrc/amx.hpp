#pragma once

#include <immintrin.h>

#include <cstdint>

namespace thrifty {
namespace {

/// Every register is a full tile of 16 rows of 64 bytes. Constant, because GCC 12 declares only 8 bytes as read by the
/// instruction and may drop stores to the others.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kTileConfig;
static_assert(sizeof(TileConfig) == 64, "as the processor reads it");

/// Tile loads are assembly that does not say what it reads.
inline void publish(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

}  // namespace
}  // namespace thrifty
