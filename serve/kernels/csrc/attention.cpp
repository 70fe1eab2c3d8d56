// Rotation, cache write and paged attention of a step's spans. See shoal_attend in shoal.h.
//
// An item is one split of a unit for one KV head; whoever finishes a unit's last split puts the
// parts together. Threads take items as they are free: which thread, and when, changes no bit.
#include <atomic>
#include <cmath>
#include <new>

#include "attention_plan.h"
#include "pool.h"

namespace shoal {
namespace {

// Fewer rows are rotated and written by the caller alone: waking others costs more.
constexpr int64_t kMinSharedRows = 4;

constexpr float kLog2E = 1.44269504088896341f;

// Cuts memory into pieces at cache lines; without memory it only measures.
class Carver {
 public:
  explicit Carver(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class Value>
  Value* take(int64_t count) {
    char* piece = memory_ == nullptr ? nullptr : memory_ + num_bytes_;
    num_bytes_ += round_up(count * sizeof(Value), kCacheLineBytes);
    return reinterpret_cast<Value*>(piece);
  }

  int64_t num_bytes() const { return num_bytes_; }

 private:
  char* memory_;
  int64_t num_bytes_ = 0;
};

// x turned by the angles of its position, halves layout.
void rotate(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t d = 0; d < half; d += kLanes) {
    const Vec first = load(x + d), second = load(x + half + d);
    const Vec c = load(cos + d), s = load(sin + d);
    store(x + d, sub(mul(first, c), mul(second, s)));
    store(x + half + d, add(mul(second, c), mul(first, s)));
  }
}

// out = the parts of one row in order of position, num_splits of them.
void combine(const Parts& parts, int64_t row, int64_t num_splits, int64_t head_dim, float* out) {
  float* weights = parts.maxima + row * parts.stride;
  float* totals = parts.totals + row * parts.stride;
  const int64_t num_padded = round_up(num_splits, kLanes);
  std::fill(weights + num_splits, weights + num_padded, kHidden);
  std::fill(totals + num_splits, totals + num_padded, 0.0f);
  Vec most = load(weights);
  for (int64_t i = kLanes; i < num_padded; i += kLanes) most = max(most, load(weights + i));
  most = set1(largest(most));
  Vec sums = zero();
  for (int64_t i = 0; i < num_padded; i += kLanes) {
    const Vec weight = power_of_negative(sub(load(weights + i), most));
    sums = fma(weight, load(totals + i), sums);
    store(weights + i, weight);
  }
  const Vec total = set1(sum(sums));
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    Vec value = zero();
    for (int64_t split = 0; split < num_splits; ++split) {
      const float* part = parts.out + (split * parts.num_rows + row) * head_dim + d;
      value = fma(set1(weights[split]), load(part), value);
    }
    store(out + d, div(value, total));
  }
}

// A thread's own memory.
template <class Value>
struct Workspace {
  Input<Value>* query;
  int64_t* num_seen;
  float* maxima;
  float* totals;
  float* parts;  // of a unit with a single split

  Workspace(Carver& memory, const Geometry& geometry)
      : query(memory.take<Input<Value>>(geometry.unit_rows * kQueryStride<Value>)),
        num_seen(memory.take<int64_t>(geometry.unit_rows)),
        maxima(memory.take<float>(geometry.unit_rows)),
        totals(memory.take<float>(geometry.unit_rows * kLanes)),
        parts(memory.take<float>(geometry.part_floats(geometry.unit_rows, 1))) {}
};

template <class Value>
class Attention {
 public:
  Attention(shoal_pool* pool, const shoal_heads& heads, const Cache<Value>& cache, float* qkv,
            float* out)
      : pool_(pool),
        cache_(cache),
        geometry_(heads),
        qkv_(qkv),
        qkv_stride_((heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim),
        out_(out),
        out_stride_(heads.num_heads * heads.head_dim) {}

  void run(const shoal_span* spans, int64_t num_spans, const float* cos, const float* sin) {
    plan(spans, num_spans);
    write_rows(cos, sin);
    for (int64_t first = 0; first < num_units_;) {
      const int64_t end = next_wave(geometry_, units_, first, num_units_, max_floats_);
      attend_wave(first, end);
      first = end;
    }
  }

 private:
  // Spans of several tokens come first: their items are the long ones.
  void plan(const shoal_span* spans, int64_t num_spans) {
    num_units_ = max_floats_ = 0;
    int64_t num_floats = 0;
    for (int64_t i = 0; i < num_spans; ++i) {
      const int64_t count = geometry_.num_units(spans[i]);
      if (count == 0) continue;
      num_units_ += count;
      const int64_t most = geometry_.most_unit_floats(spans[i]);
      max_floats_ = std::max(max_floats_, most);
      num_floats += count * most;
    }
    max_floats_ = std::max(max_floats_, std::min(kMaxPartFloats, num_floats));
    place();
    int64_t unit = 0;
    for (const bool is_long : {true, false}) {
      for (int64_t i = 0; i < num_spans; ++i) {
        if ((spans[i].num_tokens > 1) != is_long) continue;
        for (int64_t j = 0; j < geometry_.num_units(spans[i]); ++j) {
          units_[unit++] = geometry_.unit(spans[i], j);
        }
      }
    }
    for (int64_t i = 0; i < num_units_ * geometry_.num_kv_heads; ++i) new (num_done_ + i) Count(0);
  }

  void place() {
    Carver workspace(nullptr);
    Workspace<Value>(workspace, geometry_);
    workspace_bytes_ = workspace.num_bytes();
    Carver measured(nullptr);
    carve(measured);
    Carver memory(scratch(pool_, Scratch::kAttention, measured.num_bytes()));
    carve(memory);
  }

  void carve(Carver& memory) {
    units_ = memory.take<Unit>(num_units_);
    num_done_ = memory.take<Count>(num_units_ * geometry_.num_kv_heads);
    workspaces_ = memory.take<char>(shoal_pool_size(pool_) * workspace_bytes_);
    parts_ = memory.take<float>(max_floats_);
  }

  void write_rows(const float* cos, const float* sin) {
    int64_t num_rows = 0;
    for (int64_t i = 0; i < num_units_; ++i) num_rows += units_[i].num_tokens;
    if (num_rows < kMinSharedRows) {
      for (int64_t i = 0; i < num_units_; ++i) write_unit(units_[i], cos, sin);
      return;
    }
    parallel(pool_, num_units_, [&](int64_t i, int) { write_unit(units_[i], cos, sin); });
  }

  void write_unit(const Unit& unit, const float* cos, const float* sin) {
    const int64_t head_dim = geometry_.head_dim, half = head_dim / 2;
    const int64_t num_heads = geometry_.num_kv_heads * geometry_.group_size;
    for (int64_t token = 0; token < unit.num_tokens; ++token) {
      const int64_t position = unit.first_position() + token;
      float* query = row_of(unit, token);
      float* keys = query + num_heads * head_dim;
      const float* values = keys + geometry_.num_kv_heads * head_dim;
      for (float* x = query; x < values; x += head_dim) {
        rotate(x, cos + position * half, sin + position * half, half);
      }
      const int64_t block = unit.span->block_table[position / cache_.block_size];
      for (int64_t head = 0; head < geometry_.num_kv_heads; ++head) {
        cache_.write(block, head, position % cache_.block_size, keys + head * head_dim,
                     values + head * head_dim);
      }
    }
  }

  float* row_of(const Unit& unit, int64_t token) const {
    return qkv_ + (unit.span->first_row + unit.first_token + token) * qkv_stride_;
  }

  void attend_wave(int64_t first, int64_t end) {
    const int64_t num_items =
        units_[end - 1].first_item + units_[end - 1].num_splits * geometry_.num_kv_heads;
    parallel(pool_, num_items, [&](int64_t item, int thread) {
      const Unit* next = std::upper_bound(
          units_ + first, units_ + end, item,
          [](int64_t index, const Unit& unit) { return index < unit.first_item; });
      attend_item(next[-1], item - next[-1].first_item, thread);
    });
  }

  void attend_item(const Unit& unit, int64_t item, int thread) {
    const int64_t head = item % geometry_.num_kv_heads, split = item / geometry_.num_kv_heads;
    const int64_t num_rows = unit.num_tokens * geometry_.group_size;
    Carver own(workspaces_ + thread * workspace_bytes_);
    const Workspace<Value> workspace(own, geometry_);
    float* memory = workspace.parts;
    if (unit.num_splits > 1) {
      memory = parts_ + unit.first_part + head * geometry_.part_floats(num_rows, unit.num_splits);
    }
    const Parts parts(memory, num_rows, unit.num_splits);
    attend_split(unit, head, split, workspace, parts);
    if (unit.num_splits > 1) {
      Count& done = num_done_[(&unit - units_) * geometry_.num_kv_heads + head];
      if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < unit.num_splits) return;
    }
    combine_unit(unit, head, parts);
  }

  void attend_split(const Unit& unit, int64_t head, int64_t split,
                    const Workspace<Value>& workspace, const Parts& parts) {
    fill_query(unit, head, workspace);
    float* out = parts.out + split * parts.num_rows * geometry_.head_dim;
    const Rows<Value> rows = {workspace.query, workspace.num_seen, workspace.maxima,
                              workspace.totals, out};
    std::fill_n(workspace.maxima, parts.num_rows, kHidden);
    std::fill_n(workspace.totals, parts.num_rows * kLanes, 0.0f);
    std::fill_n(out, parts.num_rows * geometry_.head_dim, 0.0f);
    const int64_t num_seen = workspace.num_seen[parts.num_rows - 1];
    const int64_t end = std::min((split + 1) * kSplitTokens, num_seen);
    KeyTile<Value> tile = tile_at(unit, head, split * kSplitTokens, num_seen);
    for (int64_t position = split * kSplitTokens; position < end; position += kTileTokens) {
      // Behind the end stands the split that this thread is likely to take next.
      const bool is_last = position + kTileTokens >= num_seen;
      const KeyTile<Value> next =
          is_last ? tile : tile_at(unit, head, position + kTileTokens, num_seen);
      std::copy(next.keys, next.keys + kNumPieces, tile.next_keys);
      attend_tile(tile, rows, parts.num_rows);
      tile = next;
    }
    for (int64_t row = 0; row < parts.num_rows; ++row) {
      parts.maxima[row * parts.stride + split] = workspace.maxima[row];
      parts.totals[row * parts.stride + split] = sum(load(workspace.totals + row * kLanes));
    }
  }

  // Rows of a unit are its tokens, each with the group's heads.
  void fill_query(const Unit& unit, int64_t head, const Workspace<Value>& workspace) {
    const int64_t head_dim = geometry_.head_dim, group_size = geometry_.group_size;
    const Vec scale = set1(kLog2E / std::sqrt(static_cast<float>(head_dim)));
    for (int64_t row = 0; row < unit.num_tokens * group_size; ++row) {
      const int64_t token = row / group_size;
      workspace.num_seen[row] = unit.first_position() + token + 1;
      const float* query = row_of(unit, token) + (head * group_size + row % group_size) * head_dim;
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        store_inputs(workspace.query + row * kQueryStride<Value> + d, mul(load(query + d), scale));
      }
    }
  }

  // Of the unit's positions from one on; those behind num_seen may have no block.
  KeyTile<Value> tile_at(const Unit& unit, int64_t head, int64_t position, int64_t num_seen) const {
    const int64_t block_size = cache_.block_size;
    KeyTile<Value> tile;
    tile.first_position = position;
    tile.key_step = block_size * kInputs<Value>;
    tile.head_dim = geometry_.head_dim;
    for (int64_t i = 0; i < kNumPieces; ++i) {
      const int64_t at = position + i * kPieceTokens;
      const int64_t known = at < num_seen ? at : position;
      const int64_t block = unit.span->block_table[known / block_size], slot = known % block_size;
      tile.keys[i] = cache_.keys + cache_.offset(block, head) + slot * kInputs<Value>;
      tile.values[i] =
          cache_.values + cache_.value_offset(block, head) + slot * geometry_.head_dim;
      tile.next_keys[i] = tile.keys[i];
    }
    return tile;
  }

  void combine_unit(const Unit& unit, int64_t head, const Parts& parts) {
    const int64_t head_dim = geometry_.head_dim, group_size = geometry_.group_size;
    for (int64_t row = 0; row < parts.num_rows; ++row) {
      const int64_t token = row / group_size;
      const int64_t num_splits = (unit.first_position() + token) / kSplitTokens + 1;
      float* out = out_ + (unit.span->first_row + unit.first_token + token) * out_stride_;
      combine(parts, row, num_splits, head_dim,
              out + (head * group_size + row % group_size) * head_dim);
    }
  }

  using Count = std::atomic<int64_t>;

  shoal_pool* pool_;
  Cache<Value> cache_;
  Geometry geometry_;
  float* qkv_;
  int64_t qkv_stride_;
  float* out_;
  int64_t out_stride_;

  int64_t num_units_;
  int64_t max_floats_;  // of the parts of a wave
  int64_t workspace_bytes_;
  Unit* units_;
  Count* num_done_;  // [num_units, num_kv_heads] splits
  char* workspaces_;  // [pool size, workspace_bytes]
  float* parts_;
};

template <class Value>
void attend(shoal_pool* pool, const shoal_heads& heads, void* keys, void* values,
            const shoal_span* spans, int64_t num_spans, float* qkv, const float* cos,
            const float* sin, float* out) {
  const Cache<Value> cache(heads, keys, values);
  Attention<Value>(pool, heads, cache, qkv, out).run(spans, num_spans, cos, sin);
}

}  // namespace
}  // namespace shoal

int64_t shoal_cache_bytes(const shoal_heads* heads, int64_t num_blocks) {
  const int64_t value_bytes = heads->dtype == SHOAL_F32 ? 4 : 2;
  return num_blocks * heads->num_kv_heads * heads->block_size * heads->head_dim * value_bytes;
}

void shoal_attend(shoal_pool* pool, const shoal_heads* heads, void* keys, void* values,
                  const shoal_span* spans, int64_t num_spans, float* qkv, const float* cos,
                  const float* sin, float* out) {
  const auto run = heads->dtype == SHOAL_F32 ? shoal::attend<float>
                                             : shoal::attend<shoal::Bf16>;
  run(pool, *heads, keys, values, spans, num_spans, qkv, cos, sin, out);
}
