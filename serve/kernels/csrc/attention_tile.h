// Some rows (query heads of a KV head, of one or more tokens) against one tile of keys and values.
//
// The one decision behind it: a tile is kTileTokens positions from a fixed place, and a row's part
// in it (maximum, weights, sums) is computed from that row and the positions it sees, in one order.
// How many rows stand together only decides how often a key is loaded. Positions that a row does
// not see are overwritten before they are looked at, or never multiplied: what lies there is
// nothing to it.
#pragma once

#include <algorithm>
#include <limits>

#include "attention_cache.h"

namespace shoal {

constexpr int kTileTokens = 64;
constexpr int kMaxHeadDim = 128;
constexpr int kMinBlockSize = 16;

static_assert(PairCell::kMaxRows <= kLanes && FloatCell::kMaxRows <= kLanes,
              "what is kept of each row fits one Vec");

constexpr float kHidden = -std::numeric_limits<float>::infinity();

template <class Cell>
struct Tile {
  using Stored = typename Cell::Stored;

  const Stored* keys[kTileTokens / kMinBlockSize];  // its blocks; any where there is none
  const Stored* values[kTileTokens / kMinBlockSize];
  int64_t first_position;
  int64_t block_size;
  int64_t head_dim;

  const Stored* keys_from(int64_t token) const {
    return keys[token / block_size] + token % block_size * Cell::kInputs;
  }
};

// Where rows stand between tiles.
template <class Cell>
struct Rows {
  const typename Cell::Activation* query;  // [num_rows, kMaxHeadDim], scaled, for powers of two
  const int64_t* num_seen;                 // [num_rows] positions from 0 on; never less than before
  float* maxima;                           // [num_rows]
  float* totals;                           // [num_rows, kLanes], of weights
  float* out;                              // [num_rows, head_dim], weighted sums of values

  Rows from(int64_t row, int64_t head_dim) const {
    return {query + row * kMaxHeadDim, num_seen + row, maxima + row, totals + row * kLanes,
            out + row * head_dim};
  }
};

// 2^x for x <= 0 within 4 units in the last place; 0 below -125, exactly 1 at 0.
inline Vec power_of_negative(Vec x) {
  const Vec lowest = set1(-125.0f);
  const Vec bounded = max(lowest, x);
  const Vec n = round(bounded);
  const Vec r = sub(bounded, n);
  Vec p = set1(1.32647308e-3f);
  p = fma(p, r, set1(9.67151299e-3f));
  p = fma(p, r, set1(5.55073358e-2f));
  p = fma(p, r, set1(2.40222424e-1f));
  p = fma(p, r, set1(6.93147004e-1f));
  p = fma(p, r, set1(1.0f));
  return zero_where_less(x, lowest, mul(p, power_of_two(n)));
}

// sums[row] += num_steps steps of x[row] times the two Vecs at left and right.
template <class Cell, int kRows, int kStride>
__attribute__((always_inline)) inline void multiply(
    Vec (&sums)[kRows][2], const typename Cell::Activation* x, const typename Cell::Stored* left,
    const typename Cell::Stored* right, int64_t step, int64_t num_steps) {
  for (int64_t i = 0; i < num_steps; ++i) {
    const auto w0 = Cell::load(left);
    const auto w1 = Cell::load(right);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const auto operand = Cell::operand(x + row * kStride);
      sums[row][0] = Cell::accumulate(sums[row][0], operand, w0);
      sums[row][1] = Cell::accumulate(sums[row][1], operand, w1);
    }
    left += step;
    right += step;
    x += Cell::kInputs;
  }
}

// Query times keys of the tile's first num_tokens, and of some behind them.
template <class Cell, int kRows>
void score(const Tile<Cell>& tile, const typename Cell::Activation* query, int64_t num_tokens,
           float (&scores)[kRows][kTileTokens]) {
  for (int64_t token = 0; token < num_tokens; token += 2 * kLanes) {
    Vec sums[kRows][2];
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) sums[row][0] = sums[row][1] = zero();
    multiply<Cell, kRows, kMaxHeadDim>(sums, query, tile.keys_from(token),
                                       tile.keys_from(token + kLanes),
                                       tile.block_size * Cell::kInputs,
                                       tile.head_dim / Cell::kInputs);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      store(scores[row] + token, sums[row][0]);
      store(scores[row] + token + kLanes, sums[row][1]);
    }
  }
}

// Scores of the positions seen become weights; kept is what earlier sums are worth beside them.
template <class Cell>
void weigh(float (*scores)[kTileTokens], const int64_t* num_seen, int num_rows,
           const Rows<Cell>& rows, typename Cell::Activation (*weights)[kTileTokens],
           float (&kept)[kLanes]) {
  std::fill(kept, kept + kLanes, 0.0f);
  for (int row = 0; row < num_rows; ++row) {
    if (num_seen[row] == 0) continue;
    for (int64_t token = num_seen[row]; token % kLanes != 0; ++token) scores[row][token] = kHidden;
    Vec most = load(scores[row]);
    for (int64_t token = kLanes; token < num_seen[row]; token += kLanes) {
      most = max(most, load(scores[row] + token));
    }
    const float before = rows.maxima[row];
    rows.maxima[row] = std::max(before, largest(most));
    kept[row] = before - rows.maxima[row];
  }
  store(kept, power_of_negative(load(kept)));
  for (int row = 0; row < num_rows; ++row) {
    const Vec most = set1(rows.maxima[row]);
    Vec total = mul(load(rows.totals + row * kLanes), set1(kept[row]));
    for (int64_t token = 0; token < num_seen[row]; token += kLanes) {
      const Vec weight = power_of_negative(sub(load(scores[row] + token), most));
      total = add(total, weight);
      Cell::store_inputs(weights[row] + token, weight);
    }
    store(rows.totals + row * kLanes, total);
  }
}

// out = out * kept + weights of tokens [first, end) times their values; both are whole steps.
template <class Cell, int kRows>
void add_values(const typename Cell::Stored* const* blocks, int64_t block_size, int64_t head_dim,
                const typename Cell::Activation* weights, int64_t first, int64_t end,
                const float* kept, float* out) {
  constexpr int kInputs = Cell::kInputs;
  for (int64_t d = 0; d < head_dim; d += 2 * kLanes) {
    Vec sums[kRows][2];
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Vec factor = set1(kept[row]);
      sums[row][0] = mul(load(out + row * head_dim + d), factor);
      sums[row][1] = mul(load(out + row * head_dim + d + kLanes), factor);
    }
    for (int64_t token = first; token < end;) {
      const int64_t slot = token % block_size;
      const int64_t num_tokens = std::min(end - token, block_size - slot);
      const auto* values = blocks[token / block_size] + (slot / kInputs * head_dim + d) * kInputs;
      multiply<Cell, kRows, kTileTokens>(sums, weights + token, values, values + kLanes * kInputs,
                                         head_dim * kInputs, num_tokens / kInputs);
      token += num_tokens;
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      store(out + row * head_dim + d, sums[row][0]);
      store(out + row * head_dim + d + kLanes, sums[row][1]);
    }
  }
}

// One row's values from token `first` to where it ends, which may be in the middle of a pair.
template <class Cell>
void add_rest(const Tile<Cell>& tile, const typename Cell::Activation* weights, int64_t first,
              int64_t num_seen, float* out) {
  constexpr int kInputs = Cell::kInputs;
  const float kept = 1.0f;
  const int64_t end = num_seen / kInputs * kInputs;
  add_values<Cell, 1>(tile.values, tile.block_size, tile.head_dim, weights, first, end, &kept, out);
  if (end == num_seen) return;
  typename Cell::Stored half[kMaxHeadDim * kInputs];
  const auto* values = tile.values[end / tile.block_size] + end % tile.block_size * tile.head_dim;
  for (int64_t i = 0; i < tile.head_dim * kInputs; ++i) half[i] = i % kInputs ? 0 : values[i];
  const typename Cell::Stored* block = half;
  add_values<Cell, 1>(&block, kInputs, tile.head_dim, weights + end, 0, kInputs, &kept, out);
}

template <class Cell, int kRows>
void attend_rows(const Tile<Cell>& tile, const Rows<Cell>& rows) {
  int64_t num_seen[kRows];
  for (int row = 0; row < kRows; ++row) {
    num_seen[row] =
        std::clamp<int64_t>(rows.num_seen[row] - tile.first_position, 0, kTileTokens);
  }
  alignas(64) float scores[kRows][kTileTokens];
  alignas(64) typename Cell::Activation weights[kRows][kTileTokens];
  alignas(64) float kept[kLanes];
  score<Cell, kRows>(tile, rows.query, num_seen[kRows - 1], scores);
  weigh<Cell>(scores, num_seen, kRows, rows, weights, kept);
  const int64_t all_see = num_seen[0] / Cell::kInputs * Cell::kInputs;
  add_values<Cell, kRows>(tile.values, tile.block_size, tile.head_dim, weights[0], 0, all_see, kept,
                          rows.out);
  for (int row = 0; row < kRows; ++row) {
    if (num_seen[row] == all_see) continue;
    add_rest<Cell>(tile, weights[row], all_see, num_seen[row], rows.out + row * tile.head_dim);
  }
}

template <class Cell, int kRows = Cell::kMaxRows>
void attend_some_rows(int64_t num_rows, const Tile<Cell>& tile, const Rows<Cell>& rows) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows) return attend_some_rows<Cell, kRows - 1>(num_rows, tile, rows);
  }
  attend_rows<Cell, kRows>(tile, rows);
}

// Rows that are computed together when num_rows are left: all, even halves, or the most efficient.
template <class Cell>
int64_t rows_together(int64_t num_rows) {
  if (num_rows <= Cell::kMaxRows) return num_rows;
  return num_rows < 2 * Cell::kBestRows ? (num_rows + 1) / 2 : Cell::kBestRows;
}

template <class Cell>
void attend_tile(const Tile<Cell>& tile, const Rows<Cell>& rows, int64_t num_rows) {
  int64_t count;
  for (int64_t row = 0; row < num_rows; row += count) {
    count = rows_together<Cell>(num_rows - row);
    if (rows.num_seen[row + count - 1] <= tile.first_position) continue;
    attend_some_rows<Cell>(count, tile, rows.from(row, tile.head_dim));
  }
}

}  // namespace shoal
