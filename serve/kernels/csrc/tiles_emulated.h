// What AMX tiles do, in plain C++, for tests on CPUs that lack them. See tiles_amx.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

namespace shoal {

struct TileShapes {
  uint16_t row_bytes[16] = {};
  uint8_t num_rows[16] = {};
};

struct EmulatedTiles {
  static constexpr int kMaxRows = 16;
  static constexpr int kMaxValues = 16;  // float32 of a row, or pairs of bf16

  TileShapes shapes;
  uint32_t rows[8][kMaxRows][kMaxValues];

  void zero(int tile) { std::memset(rows[tile], 0, sizeof rows[tile]); }

  void load(int tile, const void* from, int64_t row_bytes) {
    zero(tile);
    for (int row = 0; row < shapes.num_rows[tile]; ++row) {
      std::memcpy(rows[tile][row], static_cast<const char*>(from) + row * row_bytes,
                  shapes.row_bytes[tile]);
    }
  }

  void store(int tile, void* to, int64_t row_bytes) const {
    for (int row = 0; row < shapes.num_rows[tile]; ++row) {
      std::memcpy(static_cast<char*>(to) + row * row_bytes, rows[tile][row],
                  shapes.row_bytes[tile]);
    }
  }

  // Even and odd inputs are summed apart, then both go to the sum that is there.
  void multiply(int sums, int left, int right) {
    for (int row = 0; row < shapes.num_rows[sums]; ++row) {
      Vec even{}, odd{};
      for (int pair = 0; pair < shapes.num_rows[right]; ++pair) {
        Pairs w;
        std::memcpy(&w, rows[right][pair], sizeof w);
        const Pairs x = Pairs{} + rows[left][row][pair];
        even = even + even_values(x) * even_values(w);
        odd = odd + odd_values(x) * odd_values(w);
      }
      Vec sum;
      std::memcpy(&sum, rows[sums][row], sizeof sum);
      sum = sum + (even + odd);
      std::memcpy(rows[sums][row], &sum, sizeof sum);
    }
  }
};

inline EmulatedTiles& emulated_tiles() {
  static thread_local EmulatedTiles tiles;
  return tiles;
}

inline void load_tile_shapes(const TileShapes& shapes) { emulated_tiles().shapes = shapes; }

}  // namespace shoal

#define SHOAL_TILE_ZERO(tile) emulated_tiles().zero(tile)
#define SHOAL_TILE_LOAD(tile, from, row_bytes) emulated_tiles().load(tile, from, row_bytes)
#define SHOAL_TILE_STORE(tile, to, row_bytes) emulated_tiles().store(tile, to, row_bytes)
#define SHOAL_TILE_MULTIPLY(sums, left, right) emulated_tiles().multiply(sums, left, right)
#define SHOAL_TILE_RELEASE() emulated_tiles().shapes = TileShapes()
