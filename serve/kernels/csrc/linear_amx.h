// A tile of a product of bf16 weights by AMX: up to 32 rows of activations times one panel.
//
//            panel:  0 to 15 | 16 to 31        tiles 0 to 3 hold sums,
//   rows 0 to 15         0   |   1             4 and 5 rows of activations, [rows, 32] bf16,
//   rows 16 to 31        2   |   3             6 and 7 halves of the panel, [16, 16] pairs
//
// One instruction takes 32 inputs of each row; that is a chain's step, whatever the number of rows.
#pragma once

#if defined(SHOAL_ISA_AMX)
#include "tiles_amx.h"
#else
#include "tiles_emulated.h"
#endif

#include "linear_tile.h"

namespace shoal {

constexpr int kAmxTileRows = 16;
constexpr int64_t kAmxPairs = 16;  // of inputs, in one instruction

inline TileShapes tile_shapes(int num_rows) {
  constexpr int kRowBytes = 64;
  TileShapes shapes;
  const int top = std::min(num_rows, kAmxTileRows);
  const int rows[] = {top, top, num_rows - top, num_rows - top, top, num_rows - top,
                      kAmxPairs, kAmxPairs};
  for (int tile = 0; tile < 8; ++tile) {
    shapes.num_rows[tile] = static_cast<uint8_t>(rows[tile]);
    shapes.row_bytes[tile] = rows[tile] == 0 ? 0 : kRowBytes;
  }
  return shapes;
}

inline void start_sums(const Tile& tile, bool has_bottom) {
  if (tile.is_first) {
    SHOAL_TILE_ZERO(0);
    SHOAL_TILE_ZERO(1);
    if (has_bottom) {
      SHOAL_TILE_ZERO(2);
      SHOAL_TILE_ZERO(3);
    }
    return;
  }
  const int64_t row_bytes = tile.sums_stride * static_cast<int64_t>(sizeof(float));
  SHOAL_TILE_LOAD(0, tile.sums, row_bytes);
  SHOAL_TILE_LOAD(1, tile.sums + kLanes, row_bytes);
  if (has_bottom) {
    float* bottom = tile.sums + kAmxTileRows * tile.sums_stride;
    SHOAL_TILE_LOAD(2, bottom, row_bytes);
    SHOAL_TILE_LOAD(3, bottom + kLanes, row_bytes);
  }
}

inline void store_sums(const Tile& tile, bool has_bottom) {
  const int64_t row_bytes = tile.sums_stride * static_cast<int64_t>(sizeof(float));
  SHOAL_TILE_STORE(0, tile.sums, row_bytes);
  SHOAL_TILE_STORE(1, tile.sums + kLanes, row_bytes);
  if (has_bottom) {
    float* bottom = tile.sums + kAmxTileRows * tile.sums_stride;
    SHOAL_TILE_STORE(2, bottom, row_bytes);
    SHOAL_TILE_STORE(3, bottom + kLanes, row_bytes);
  }
}

inline void multiply_by_amx(const Tile& tile) {
  constexpr int64_t kStepBytes = kPanelWidth * 2 * sizeof(Bf16);
  const bool has_bottom = tile.num_rows > kAmxTileRows;
  const int64_t row_bytes = tile.input_stride * static_cast<int64_t>(sizeof(Bf16));
  const int64_t ahead_bytes = tile.ahead_step_bytes * kAmxPairs;
  const char* x = static_cast<const char*>(tile.inputs);
  const char* w = static_cast<const char*>(tile.panel);
  const char* ahead = tile.ahead;
  load_tile_shapes(tile_shapes(static_cast<int>(tile.num_rows)));
  start_sums(tile, has_bottom);
  for (int64_t step = 0; step < tile.num_steps; step += kAmxPairs) {
    for (int64_t i = 0; i < ahead_bytes; i += kCacheLineBytes) prefetch(ahead + i);
    SHOAL_TILE_LOAD(4, x, row_bytes);
    SHOAL_TILE_LOAD(6, w, kStepBytes);
    SHOAL_TILE_LOAD(7, w + kStepBytes / 2, kStepBytes);
    SHOAL_TILE_MULTIPLY(0, 4, 6);
    SHOAL_TILE_MULTIPLY(1, 4, 7);
    if (has_bottom) {
      SHOAL_TILE_LOAD(5, x + kAmxTileRows * row_bytes, row_bytes);
      SHOAL_TILE_MULTIPLY(2, 5, 6);
      SHOAL_TILE_MULTIPLY(3, 5, 7);
    }
    x += kAmxPairs * 2 * sizeof(Bf16);
    w += kAmxPairs * kStepBytes;
    ahead += ahead_bytes;
  }
  store_sums(tile, has_bottom);
  SHOAL_TILE_RELEASE();  // what is in tiles would be saved with the thread
}

template <>
struct Tiles<Bf16> {
  static constexpr int kRows = 2 * kAmxTileRows;
  static constexpr int kRowsOfTwoPanels = 0;
  static constexpr bool kIsInterleaved = false;  // rows: [rows, inputs]
  static TileFunction function(int64_t, int64_t) { return multiply_by_amx; }
};

}  // namespace shoal
