// How keys and values lie in the cache, and what reads them.
//
// A block of keys is a packed panel, (head_dim / 2 pairs, block_size tokens, 2): scores are a
// linear product whose outputs are tokens. A block of values is (block_size / 2 pairs of tokens,
// head_dim, 2): the weighted sum is one whose outputs are dimensions. In float32 there are no
// pairs. The one decision behind it: both products run through the same loop, and neither sums
// across lanes.
#pragma once

#include "shoal.h"
#include "vec.h"

namespace shoal {

// A bf16 cache: a step multiplies two inputs. Sums of 2 Vecs for each row, and what is multiplied,
// fill the registers at kBestRows; even a group of seven heads fits AVX2's sixteen, where an
// operand is loaded anew for each Vec.
struct PairCell {
  using Stored = Bf16;
  using Activation = shoal::Activation;
  using Operand = shoal::Operand;
  static constexpr int kInputs = 2;
  static constexpr int kBestRows = kTileRows;
  static constexpr int kMaxRows = kTileRows + kTileRows / 6;

  static Pairs load(const Stored* p) { return load_pairs(p); }
  static Operand operand(const Activation* x) { return load_operand(x); }
  static Vec accumulate(Vec sum, Operand x, Pairs w) { return shoal::accumulate(sum, x, w); }
  static void store_inputs(Activation* p, Vec x) { store_activations(p, x); }
  static Stored stored(float value) { return to_bf16(value); }
};

// A float32 cache: a step multiplies one.
struct FloatCell {
  using Stored = float;
  using Activation = float;
  using Operand = Vec;
  static constexpr int kInputs = 1;
  static constexpr int kBestRows = 6;
  static constexpr int kMaxRows = 7;

  static Vec load(const Stored* p) { return shoal::load(p); }
  static Operand operand(const Activation* x) { return set1(*x); }
  static Vec accumulate(Vec sum, Operand x, Vec w) { return fma(x, w, sum); }
  static void store_inputs(Activation* p, Vec x) { store(p, x); }
  static Stored stored(float value) { return value; }
};

// One layer's keys and values.
template <class Cell>
struct Cache {
  using Stored = typename Cell::Stored;

  Stored* keys;
  Stored* values;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t block_size;

  Cache(const shoal_heads& heads, void* keys, void* values)
      : keys(static_cast<Stored*>(keys)),
        values(static_cast<Stored*>(values)),
        num_kv_heads(heads.num_kv_heads),
        head_dim(heads.head_dim),
        block_size(heads.block_size) {}

  // Where the block's keys, or values, of a head begin.
  int64_t offset(int64_t block, int64_t head) const {
    return (block * num_kv_heads + head) * block_size * head_dim;
  }

  void write(int64_t block, int64_t head, int64_t token, const float* key, const float* value) {
    constexpr int kInputs = Cell::kInputs;
    Stored* panel = keys + offset(block, head) + token * kInputs;
    for (int64_t d = 0; d < head_dim; ++d) {
      panel[d / kInputs * block_size * kInputs + d % kInputs] = Cell::stored(key[d]);
    }
    Stored* row = values + offset(block, head) + token / kInputs * head_dim * kInputs;
    for (int64_t d = 0; d < head_dim; ++d) {
      row[d * kInputs + token % kInputs] = Cell::stored(value[d]);
    }
  }
};

}  // namespace shoal
