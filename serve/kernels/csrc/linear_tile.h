// One register tile of a matrix product: some rows of activations times one or two panels.
//
// Every output has one chain of sums over its inputs, from the first to the last, whatever stands
// beside it; a chain may be put down in memory and taken up again, which changes no bit of it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "packed.h"

namespace shoal {

// What a tile reads and writes. A step is one of the panel's, see packed.h.
struct Tile {
  int64_t num_rows;
  const void* inputs;    // of the tile's rows, from its first step on
  int64_t input_stride;  // values from row to row, where rows do not lie interleaved
  const void* panel;     // from its first step on
  int64_t panel_bytes;   // to the next panel, where two are read
  int64_t num_steps;
  float* sums;  // [rows, sums_stride]; a panel's outputs stand side by side
  int64_t sums_stride;
  bool is_first;      // the chains start here: sums holds nothing yet
  const char* ahead;  // what will be read next, to be fetched meanwhile, for each panel
  int64_t ahead_step_bytes;
};

// How a weight of Value meets activations. kPhases inputs of a step are multiplied one by one where
// the CPU has no product of pairs: first every even input of the tile, then every odd one, so that
// half of the weights is in registers at a time.
template <class Value>
struct Weights;

template <>
struct Weights<float> {
  using Input = float;
  static constexpr int kPhases = 1;
  static Vec load_weights(const float* p, int) { return load(p); }
  static Vec load_input(const float* p, int) { return set1(*p); }
  static Vec accumulate(Vec acc, Vec x, Vec w) { return add_product(acc, x, w); }
};

template <class Kept>
struct PairWeights {  // Kept: Activation, so that only one of both has to compile
  using Input = Kept;
  static constexpr int kPhases = 1;
  static Pairs load_weights(const Bf16* p, int) { return load_pairs(p); }
  static Operand load_input(const Kept* p, int) { return load_operand(p); }
  static Vec accumulate(Vec acc, Operand x, Pairs w) { return shoal::accumulate(acc, x, w); }
};

struct WidenedWeights {
  using Input = float;
  static constexpr int kPhases = 2;
  static Vec load_weights(const Bf16* p, int phase) {
    return phase == 0 ? even_values(load_pairs(p)) : odd_values(load_pairs(p));
  }
  static Vec load_input(const float* p, int phase) { return set1(p[phase]); }
  static Vec accumulate(Vec acc, Vec x, Vec w) { return add_product(acc, x, w); }
};

template <>
struct Weights<Bf16> : std::conditional_t<std::is_same<Activation, float>::value, WidenedWeights,
                                          PairWeights<Activation>> {};

template <int kRows, int kVecs>
struct Sums {
  Vec values[kRows][kVecs];

  void load_from(const Tile& tile) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const float* from = tile.sums + row * tile.sums_stride + v * kLanes;
        values[row][v] = tile.is_first ? zero() : load(from);
      }
    }
  }

  void store_to(const Tile& tile) const {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        store(tile.sums + row * tile.sums_stride + v * kLanes, values[row][v]);
      }
    }
  }
};

template <int kPanels, int64_t kStepBytes>
void fetch_ahead(const Tile& tile, const char* ahead) {
#pragma GCC unroll 2
  for (int panel = 0; panel < kPanels; ++panel) {
    const char* from = ahead + panel * tile.panel_bytes;
    prefetch(from);
    if (kStepBytes > kCacheLineBytes) prefetch(from + kCacheLineBytes);
  }
}

template <class Value, int kRows, int kPanels>
void multiply_tile(const Tile& tile) {
  using W = Weights<Value>;
  constexpr int64_t kStepInputs = Packed<Value>::kStepInputs;
  constexpr int64_t kStepSize = kStepInputs * kPanelWidth;
  constexpr int kVecs = kPanels * kPanelVecs;
  const auto* x = static_cast<const typename W::Input*>(tile.inputs);
  const auto* w = static_cast<const Value*>(tile.panel);
  const int64_t next_panel = tile.panel_bytes / static_cast<int64_t>(sizeof(Value));
  const char* ahead = tile.ahead;
  Sums<kRows, kVecs> sums;
  sums.load_from(tile);
  for (int64_t step = 0; step < tile.num_steps; ++step) {
    fetch_ahead<kPanels, kStepSize * sizeof(Value)>(tile, ahead);
#pragma GCC unroll 2
    for (int phase = 0; phase < W::kPhases; ++phase) {
      decltype(W::load_weights(w, 0)) weights[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const Value* panel = w + v / kPanelVecs * next_panel;
        weights[v] = W::load_weights(panel + v % kPanelVecs * kLanes * kStepInputs, phase);
      }
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const auto input = W::load_input(x + row * kStepInputs, phase);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          sums.values[row][v] = W::accumulate(sums.values[row][v], input, weights[v]);
        }
      }
    }
    x += kRows * kStepInputs;
    w += kStepSize;
    ahead += tile.ahead_step_bytes;
  }
  sums.store_to(tile);
}

// Two panels at a time for one or two rows, which alone would wait for each sum before the next.
constexpr int kMaxRowsOfTwoPanels = 2;

using TileFunction = void (*)(const Tile& tile);

template <class Value, int... kRows>
TileFunction vector_tile_function(int64_t num_rows, int64_t num_panels,
                                  std::integer_sequence<int, kRows...>) {
  static constexpr TileFunction one[] = {multiply_tile<Value, kRows + 1, 1>...};
  static constexpr TileFunction two[] = {
      multiply_tile<Value, std::min(kRows + 1, kMaxRowsOfTwoPanels), 2>...};
  return num_panels == 2 ? two[num_rows - 1] : one[num_rows - 1];
}

// How rows times panels of Value are done here.
template <class Value>
struct VectorTiles {
  static constexpr int kRows = kTileRows;
  static constexpr int kRowsOfTwoPanels = kMaxRowsOfTwoPanels;
  static constexpr bool kIsInterleaved = true;  // rows: [num_steps, rows, kStepInputs]
  static TileFunction function(int64_t num_rows, int64_t num_panels) {
    return vector_tile_function<Value>(num_rows, num_panels,
                                       std::make_integer_sequence<int, kTileRows>());
  }
};

template <class Value>
struct Tiles : VectorTiles<Value> {};

}  // namespace shoal
