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

constexpr int64_t kTileTokens = 64;
constexpr int64_t kMaxHeadDim = 128;
constexpr int64_t kPieceTokens = 16;  // of a block, or of half of one
constexpr int64_t kNumPieces = kTileTokens / kPieceTokens;

// Sums of 2 Vecs for each row, and what is multiplied, fill the registers.
template <class Value>
constexpr int kMaxRows = std::is_same_v<Input<Value>, float> ? 6 : kTileRows;

// From a row's inputs to the next's: rows lie in different banks of the first cache, else two of
// their inputs cannot be loaded at once.
template <class Value, int64_t kSize>
constexpr int64_t kSkewed = kSize + 8 / sizeof(Input<Value>);
template <class Value>
constexpr int64_t kQueryStride = kSkewed<Value, kMaxHeadDim>;
template <class Value>
constexpr int64_t kWeightStride = kSkewed<Value, kTileTokens>;

constexpr float kHidden = -std::numeric_limits<float>::infinity();

// The tile's keys and values in pieces; any where there is none. The keys of the tile behind it
// are fetched meanwhile.
template <class Value>
struct KeyTile {
  const Value* keys[kNumPieces];
  const Value* values[kNumPieces];
  const Value* next_keys[kNumPieces];
  int64_t first_position;
  int64_t key_step;  // from a key's inputs to its next
  int64_t head_dim;
};

// Where rows stand between tiles.
template <class Value>
struct Rows {
  const Input<Value>* query;  // [num_rows, kQueryStride], scaled, for powers of two
  const int64_t* num_seen;    // [num_rows] positions from 0 on; never less than before
  float* maxima;              // [num_rows]
  float* totals;              // [num_rows, kLanes], of weights
  float* out;                 // [num_rows, head_dim], weighted sums of values

  Rows from(int64_t row, int64_t head_dim) const {
    return {query + row * kQueryStride<Value>, num_seen + row, maxima + row, totals + row * kLanes,
            out + row * head_dim};
  }
};

// 2^x for x <= 0 within 4 units in the last place; 0 below -126.5, exactly 1 at 0.
inline Vec power_of_negative(Vec x) {
  const Vec bounded = max(set1(-127.0f), x);
  const Vec n = round(bounded);
  const Vec r = sub(bounded, n);
  Vec p = set1(1.32647308e-3f);
  p = fma(p, r, set1(9.67151299e-3f));
  p = fma(p, r, set1(5.55073358e-2f));
  p = fma(p, r, set1(2.40222424e-1f));
  p = fma(p, r, set1(6.93147004e-1f));
  p = fma(p, r, set1(1.0f));
  return mul(p, power_of_two(n));  // of -127: the bits of 0
}

// What two Vecs side by side read, step by step, and the cache lines to fetch meanwhile.
template <class Value>
struct Stream {
  const Value* left;
  const Value* right;
  int64_t step;
  const Value* ahead;
  const Value* ahead_right;  // where two Vecs are two cache lines
  int64_t ahead_step;
};

// sums[row] += num_steps steps of x[row] times the stream.
template <class Value, int kRows, int64_t kStride>
__attribute__((always_inline)) inline void multiply(Vec (&sums)[kRows][2], const Input<Value>* x,
                                                    Stream<Value> from, int64_t num_steps) {
  using W = Weights<Value>;
  for (int64_t i = 0; i < num_steps; ++i) {
    prefetch(from.ahead);
    if (kLanes > 8) prefetch(from.ahead_right);
#pragma GCC unroll 2
    for (int phase = 0; phase < W::kPhases; ++phase) {
      const auto left = W::load_weights(from.left, phase);
      const auto right = W::load_weights(from.right, phase);
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const auto input = W::load_input(x + row * kStride, phase);
        sums[row][0] = W::accumulate(sums[row][0], input, left);
        sums[row][1] = W::accumulate(sums[row][1], input, right);
      }
    }
    from.left += from.step;
    from.right += from.step;
    from.ahead += from.ahead_step;
    from.ahead_right += from.ahead_step;
    x += kInputs<Value>;
  }
}

// Query times keys of the tile's first num_tokens, and of some behind them; fetches values.
template <class Value, int kRows>
void score(const KeyTile<Value>& tile, const Input<Value>* query, int64_t num_tokens,
           float (&scores)[kRows][kTileTokens]) {
  constexpr int64_t kLine = kCacheLineBytes / sizeof(Value);
  for (int64_t token = 0; token < num_tokens; token += 2 * kLanes) {
    const int64_t piece = token / kPieceTokens;
    const int64_t next = (token + kLanes) / kPieceTokens;
    const int64_t next_offset = (token + kLanes) % kPieceTokens * kInputs<Value>;
    Vec sums[kRows][2];
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) sums[row][0] = sums[row][1] = zero();
    multiply<Value, kRows, kQueryStride<Value>>(sums, query,
                                        {tile.keys[piece], tile.keys[next] + next_offset,
                                         tile.key_step, tile.values[piece], tile.values[next],
                                         kLine},
                                        tile.head_dim / kInputs<Value>);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      store(scores[row] + token, sums[row][0]);
      store(scores[row] + token + kLanes, sums[row][1]);
    }
  }
}

// The most of what each row has seen; change is how much less it was before. The first loop of
// weighing, apart from the second so that rows need not wait for each other.
template <class Value>
void raise_maxima(float (*scores)[kTileTokens], const int64_t* num_seen, int num_rows,
                  float* maxima, float* change) {
  for (int row = 0; row < num_rows; ++row) {
    change[row] = 0.0f;
    if (num_seen[row] == 0) continue;
    for (int64_t token = num_seen[row]; token % kLanes != 0; ++token) scores[row][token] = kHidden;
    Vec most = load(scores[row]);
    for (int64_t token = kLanes; token < num_seen[row]; token += kLanes) {
      most = max(most, load(scores[row] + token));
    }
    const float before = maxima[row];
    maxima[row] = std::max(before, largest(most));
    change[row] = before - maxima[row];
  }
}

// Scores of the positions seen become weights; kept is what earlier sums are worth beside them.
template <class Value>
void weigh(float (*scores)[kTileTokens], const int64_t* num_seen, int num_rows,
           const Rows<Value>& rows, Input<Value> (*weights)[kWeightStride<Value>],
           float (*kept)[kLanes]) {
  float change[kMaxRows<Value>];
  raise_maxima<Value>(scores, num_seen, num_rows, rows.maxima, change);
  for (int row = 0; row < num_rows; ++row) {
    const Vec factor = power_of_negative(set1(change[row]));
    store(kept[row], factor);
    const Vec most = set1(rows.maxima[row]);
    Vec total = mul(load(rows.totals + row * kLanes), factor);
    for (int64_t token = 0; token < num_seen[row]; token += kLanes) {
      const Vec weight = power_of_negative(sub(load(scores[row] + token), most));
      total = add(total, weight);
      store_inputs(weights[row] + token, weight);
    }
    store(rows.totals + row * kLanes, total);
  }
}

// out = out * kept + weights of the tile's tokens [first, end) times their values, both whole
// steps; fetches the next tile's keys.
template <class Value, int kRows>
void add_values(const KeyTile<Value>& tile, const Input<Value>* weights, int64_t first, int64_t end,
                const float (*kept)[kLanes], float* out) {
  const int64_t head_dim = tile.head_dim;
  for (int64_t d = 0; d < head_dim; d += 2 * kLanes) {
    Vec sums[kRows][2];
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Vec factor = load(kept[row]);
      sums[row][0] = mul(load(out + row * head_dim + d), factor);
      sums[row][1] = mul(load(out + row * head_dim + d + kLanes), factor);
    }
    for (int64_t token = first; token < end;) {
      const int64_t piece = token / kPieceTokens, slot = token % kPieceTokens;
      const int64_t num_tokens = std::min(end - token, kPieceTokens - slot);
      const Value* values = tile.values[piece] + slot * head_dim + d * kInputs<Value>;
      const Value* ahead = tile.next_keys[piece] + d / kInputs<Value> * tile.key_step;
      multiply<Value, kRows, kWeightStride<Value>>(sums, weights + token,
                                          {values, values + kLanes * kInputs<Value>,
                                           head_dim * kInputs<Value>, ahead,
                                           ahead + tile.key_step, kLanes / 8 * tile.key_step},
                                          num_tokens / kInputs<Value>);
      token += num_tokens;
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      store(out + row * head_dim + d, sums[row][0]);
      store(out + row * head_dim + d + kLanes, sums[row][1]);
    }
  }
}

template <class Value, int kRows = kMaxRows<Value>>
void add_some_values(int64_t num_rows, const KeyTile<Value>& tile, const Input<Value>* weights,
                     int64_t first, int64_t end, const float (*kept)[kLanes], float* out) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows) {
      return add_some_values<Value, kRows - 1>(num_rows, tile, weights, first, end, kept, out);
    }
  }
  add_values<Value, kRows>(tile, weights, first, end, kept, out);
}

// Values of rows that see as much, from token `first` to where they end, which may be in the
// middle of a pair.
template <class Value>
void add_rest(int64_t num_rows, const KeyTile<Value>& tile, const Input<Value>* weights,
              int64_t first, int64_t num_seen, float* out) {
  constexpr int64_t kPair = kInputs<Value>;
  alignas(64) float kept[kMaxRows<Value>][kLanes];
  for (int row = 0; row < num_rows; ++row) store(kept[row], set1(1.0f));
  const int64_t end = num_seen / kPair * kPair;
  if (first < end) add_some_values<Value>(num_rows, tile, weights, first, end, kept, out);
  if (end == num_seen) return;
  Value half[kMaxHeadDim * kPair];
  const Value* values = tile.values[end / kPieceTokens] + end % kPieceTokens * tile.head_dim;
  for (int64_t i = 0; i < tile.head_dim * kPair; ++i) half[i] = i % kPair ? 0 : values[i];
  KeyTile<Value> rest = tile;
  rest.values[0] = half;
  add_some_values<Value>(num_rows, rest, weights + end, 0, kPair, kept, out);
}

template <class Value, int kRows>
void attend_rows(const KeyTile<Value>& tile, const Rows<Value>& rows) {
  int64_t num_seen[kRows];
  for (int row = 0; row < kRows; ++row) {
    num_seen[row] =
        std::clamp<int64_t>(rows.num_seen[row] - tile.first_position, 0, kTileTokens);
  }
  alignas(64) float scores[kRows][kTileTokens];
  alignas(64) Input<Value> weights[kRows][kWeightStride<Value>];
  alignas(64) float kept[kRows][kLanes];
  score<Value, kRows>(tile, rows.query, num_seen[kRows - 1], scores);
  weigh<Value>(scores, num_seen, kRows, rows, weights, kept);
  const int64_t all_see = num_seen[0] / kInputs<Value> * kInputs<Value>;
  add_values<Value, kRows>(tile, weights[0], 0, all_see, kept, rows.out);
  int end;
  for (int row = 0; row < kRows; row = end) {
    for (end = row + 1; end < kRows && num_seen[end] == num_seen[row];) ++end;
    if (num_seen[row] == all_see) continue;
    add_rest<Value>(end - row, tile, weights[row], all_see, num_seen[row],
                    rows.out + row * tile.head_dim);
  }
}

template <class Value, int kRows = kMaxRows<Value>>
void attend_some_rows(int64_t num_rows, const KeyTile<Value>& tile, const Rows<Value>& rows) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows) return attend_some_rows<Value, kRows - 1>(num_rows, tile, rows);
  }
  attend_rows<Value, kRows>(tile, rows);
}

// Rows that are computed together when num_rows are left: all, even halves, or as many as can be.
template <class Value>
int64_t rows_together(int64_t num_rows) {
  if (num_rows <= kMaxRows<Value>) return num_rows;
  return num_rows < 2 * kMaxRows<Value> ? (num_rows + 1) / 2 : kMaxRows<Value>;
}

template <class Value>
void attend_tile(const KeyTile<Value>& tile, const Rows<Value>& rows, int64_t num_rows) {
  int64_t count;
  for (int64_t row = 0; row < num_rows; row += count) {
    count = rows_together<Value>(num_rows - row);
    if (rows.num_seen[row + count - 1] <= tile.first_position) continue;
    attend_some_rows<Value>(count, tile, rows.from(row, tile.head_dim));
  }
}

}  // namespace shoal
