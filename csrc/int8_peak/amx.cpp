#include "../amx.hpp"

#include "../kernels.hpp"

namespace thrifty {

uint64_t amx::multiply(uint64_t turns, uint32_t* sink) {
  alignas(64) int8_t bytes[16][64];
  for (auto& row : bytes)
    for (int8_t& byte : row) byte = 3;
  alignas(64) int32_t sums[16][16];
  publish(bytes);
  _tile_loadconfig(&kTileConfigs.rows[16]);
  _tile_loadd(6, bytes, 64);
  _tile_loadd(7, bytes, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (uint64_t turn = 0; turn < turns; ++turn) {
    _tile_dpbssd(0, 6, 7);
    _tile_dpbssd(1, 6, 7);
    _tile_dpbssd(2, 6, 7);
    _tile_dpbssd(3, 6, 7);
    _tile_dpbssd(4, 6, 7);
    _tile_dpbssd(5, 6, 7);
  }
  _tile_stored(0, sums, 64);
  publish(sums);
  _tile_release();
  *sink ^= uint32_t(sums[0][0]);
  return turns * 6 * 16 * 16 * 64;
}

}  // namespace thrifty
