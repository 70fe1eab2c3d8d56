// AMX tiles: 16 rows of 64 bytes each, products of bf16 pairs summed in float32. Included by
// linear_amx.h. A tile's number must be a literal, so these are macros.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace shoal {

struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t num_rows[16] = {};
};

// Not the compiler's intrinsic, which tells it of the first eight bytes only.
inline void load_tile_shapes(const TileShapes& shapes) {
  asm volatile("ldtilecfg %0" : : "m"(shapes) : "memory");
}

}  // namespace shoal

#define SHOAL_TILE_ZERO(tile) _tile_zero(tile)
#define SHOAL_TILE_LOAD(tile, from, row_bytes) _tile_loadd(tile, from, row_bytes)
#define SHOAL_TILE_STORE(tile, to, row_bytes) _tile_stored(tile, to, row_bytes)
#define SHOAL_TILE_MULTIPLY(sums, left, right) _tile_dpbf16ps(sums, left, right)
#define SHOAL_TILE_RELEASE() _tile_release()
