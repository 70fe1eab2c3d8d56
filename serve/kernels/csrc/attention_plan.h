// Cuts a step into units (a query tile of one span) and splits (kSplitTokens positions of its
// context), the pieces that threads share.
//
// The one decision behind it: splits begin at fixed positions, so the parts of which a row's result
// is put together depend on its own position only. Units that have more than one split keep their
// parts in scratch; as many of them as fit the bound make a wave.
#pragma once

#include <algorithm>

#include "attention_tile.h"
#include "pool.h"

namespace shoal {

constexpr int64_t kSplitTokens = 512;
constexpr int64_t kUnitRows = 128;  // about: products of a unit outweigh loading keys and values
constexpr int64_t kMaxPartFloats = 4 << 20;

static_assert(kSplitTokens % kTileTokens == 0, "tiles lie within a split");

struct Unit {
  const shoal_span* span;
  int64_t first_token;  // of the span
  int64_t num_tokens;
  int64_t num_splits;
  int64_t first_item;  // of the wave; items are its splits, each for all KV heads
  int64_t first_part;  // in scratch, float

  int64_t first_position() const { return span->first_position + first_token; }
};

// What the rows of one unit and KV head made of each split.
struct Parts {
  float* maxima;  // [num_rows, stride]
  float* totals;  // [num_rows, stride]
  float* out;     // [num_splits, num_rows, head_dim]
  int64_t num_rows;
  int64_t stride;

  Parts(float* memory, int64_t num_rows, int64_t num_splits)
      : maxima(memory), num_rows(num_rows), stride(round_up(num_splits, kLanes)) {
    totals = maxima + num_rows * stride;
    out = totals + num_rows * stride;
  }
};

struct Geometry {
  int64_t num_kv_heads;
  int64_t group_size;  // query heads of a KV head
  int64_t head_dim;
  int64_t unit_tokens;
  int64_t unit_rows;

  explicit Geometry(const shoal_heads& heads)
      : num_kv_heads(heads.num_kv_heads),
        group_size(heads.num_heads / heads.num_kv_heads),
        head_dim(heads.head_dim),
        unit_tokens(std::max<int64_t>(1, kUnitRows / group_size)),
        unit_rows(unit_tokens * group_size) {}

  // Floats of the parts of some rows of one KV head.
  int64_t part_floats(int64_t num_rows, int64_t num_splits) const {
    return num_rows * (2 * round_up(num_splits, kLanes) + num_splits * head_dim);
  }

  int64_t unit_floats(const Unit& unit) const {
    if (unit.num_splits == 1) return 0;
    return num_kv_heads * part_floats(unit.num_tokens * group_size, unit.num_splits);
  }

  // Of any unit of a span.
  int64_t most_unit_floats(const shoal_span& span) const {
    const int64_t num_splits = (span.first_position + span.num_tokens - 1) / kSplitTokens + 1;
    const int64_t num_rows = std::min(unit_tokens, span.num_tokens) * group_size;
    return num_splits == 1 ? 0 : num_kv_heads * part_floats(num_rows, num_splits);
  }

  int64_t num_units(const shoal_span& span) const {
    return (span.num_tokens + unit_tokens - 1) / unit_tokens;
  }

  Unit unit(const shoal_span& span, int64_t index) const {
    Unit unit = {&span, index * unit_tokens, 0, 0, 0, 0};
    unit.num_tokens = std::min(unit_tokens, span.num_tokens - unit.first_token);
    const int64_t last = unit.first_position() + unit.num_tokens - 1;
    unit.num_splits = last / kSplitTokens + 1;
    return unit;
  }
};

// The next wave of units [first, num_units): its end. Sets where items and parts of each begin.
inline int64_t next_wave(const Geometry& geometry, Unit* units, int64_t first, int64_t num_units,
                         int64_t max_floats) {
  int64_t num_items = 0, num_floats = 0, end = first;
  for (; end < num_units; ++end) {
    const int64_t more = geometry.unit_floats(units[end]);
    if (end > first && num_floats + more > max_floats) break;
    units[end].first_item = num_items;
    units[end].first_part = num_floats;
    num_items += units[end].num_splits * geometry.num_kv_heads;
    num_floats += more;
  }
  return end;
}

}  // namespace shoal
