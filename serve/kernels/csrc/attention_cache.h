// How keys and values lie in the cache, and what reads them.
//
// A block of keys is a packed panel, (head_dim / 2 pairs, block_size tokens, 2): scores are a
// linear product whose outputs are tokens. A block of values is (block_size / 2 pairs of tokens,
// head_dim, 2): the weighted sum is one whose outputs are dimensions. In float32 there are no
// pairs. The one decision behind it: both products run through the same loop, and neither sums
// across lanes.
#pragma once

#include "linear_tile.h"
#include "shoal.h"

namespace shoal {

template <class Value>
using Input = typename Weights<Value>::Input;

template <class Value>
constexpr int64_t kInputs = Packed<Value>::kStepInputs;

template <class Value>
Value stored(float value) {
  if constexpr (std::is_same_v<Value, float>) return value;
  else return to_bf16(value);
}

template <class Value>
void store_inputs(Value* p, Vec x) {
  if constexpr (std::is_same_v<Value, float>) store(p, x);
  else store_activations(p, x);
}

// One layer's keys and values.
template <class Value>
struct Cache {
  Value* keys;
  Value* values;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t block_size;

  Cache(const shoal_heads& heads, void* keys, void* values)
      : keys(static_cast<Value*>(keys)),
        values(static_cast<Value*>(values)),
        num_kv_heads(heads.num_kv_heads),
        head_dim(heads.head_dim),
        block_size(heads.block_size) {}

  // Where the block's keys of a head begin.
  int64_t offset(int64_t block, int64_t head) const {
    return (block * num_kv_heads + head) * block_size * head_dim;
  }

  // Where the block's values of a head begin: in the place of the next head, else a small head's
  // keys and values would share half of the first cache and push each other out of it.
  int64_t value_offset(int64_t block, int64_t head) const {
    return offset(block, (head + 1) % num_kv_heads);
  }

  void write(int64_t block, int64_t head, int64_t slot, const float* key, const float* value) {
    constexpr int64_t kPair = kInputs<Value>;
    Value* column = keys + offset(block, head) + slot * kPair;
    for (int64_t d = 0; d < head_dim; d += kPair) {
      for (int64_t i = 0; i < kPair; ++i) column[d * block_size + i] = stored<Value>(key[d + i]);
    }
    Value* row =
        values + value_offset(block, head) + slot / kPair * head_dim * kPair + slot % kPair;
    for (int64_t d = 0; d < head_dim; ++d) row[d * kPair] = stored<Value>(value[d]);
  }
};

}  // namespace shoal
