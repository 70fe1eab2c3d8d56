// The whole pass of one rank over one step, composed from the other kernels. See shoal_forward.
//
// Nothing is computed here: what runs on which rows, in which memory, and where ranks meet. The one
// decision behind it: the residual stream and what the branches add to it stay apart until the next
// norm, which adds and norms in one pass over memory.

#include <algorithm>
#include <cstring>

#include "pool.h"
#include "shoal.h"

namespace shoal {
namespace {

constexpr int64_t kAlignedFloats = 16;  // 64 bytes

int64_t aligned(int64_t num_floats) {
  return (num_floats + kAlignedFloats - 1) / kAlignedFloats * kAlignedFloats;
}

class Pass {
 public:
  Pass(shoal_pool* pool, const shoal_decoder& decoder, const shoal_collectives& collectives,
       const shoal_step& step)
      : pool_(pool), decoder_(decoder), collectives_(collectives), step_(step),
        num_rows_(step.num_rows) {
    const shoal_heads& heads = decoder.heads;
    q_size_ = int64_t{heads.num_heads} * heads.head_dim;
    qkv_size_ = q_size_ + 2 * int64_t{heads.num_kv_heads} * heads.head_dim;
    take_memory();
  }

  bool run() {
    if (!embed()) return false;
    const float* delta = nullptr;
    for (int64_t index = 0; index < decoder_.num_layers; ++index) {
      const shoal_layer& layer = decoder_.layers[index];
      norm(delta, layer.input_norm);
      attend(layer);
      // Behind the last attention only rows that are sampled matter.
      if (index == decoder_.num_layers - 1) keep_sampled();
      if (num_rows_ > 0 && !finish(layer)) return false;
      delta = delta_;
    }
    return num_rows_ == 0 || sample();
  }

 private:
  //   residual [rows, hidden]   the residual stream
  //   delta    [rows, hidden]   what a branch adds to it
  //   narrow   [rows, max(hidden, query heads)]   normed rows, then attended ones
  //   wide     [rows, max(query, key, value heads; ffn)]
  void take_memory() {
    const int64_t rows = num_rows_, hidden = decoder_.hidden;
    const int64_t hidden_size = aligned(rows * hidden);
    const int64_t narrow_size = aligned(rows * std::max(hidden, q_size_));
    const int64_t wide_size = aligned(rows * std::max(qkv_size_, decoder_.ffn));
    const int64_t num_floats = 2 * hidden_size + narrow_size + wide_size;
    residual_ = static_cast<float*>(
        scratch(pool_, Scratch::kHidden, num_floats * int64_t{sizeof(float)}));
    delta_ = residual_ + hidden_size;
    narrow_ = delta_ + hidden_size;
    wide_ = narrow_ + narrow_size;
  }

  // Rows of tokens that other ranks hold are zero here, so that the sum is the row.
  bool embed() {
    int64_t* rows = static_cast<int64_t*>(
        scratch(pool_, Scratch::kGathered, num_rows_ * int64_t{sizeof(int64_t)}));
    for (int64_t i = 0; i < num_rows_; ++i) {
      const int64_t row = step_.token_ids[i] - decoder_.first_token_id;
      rows[i] = row >= 0 && row < decoder_.num_token_ids ? row : -1;
    }
    shoal_unpack_rows(pool_, &decoder_.embedding, rows, num_rows_, residual_);
    return all_reduce(residual_);
  }

  void norm(const float* delta, const float* weight) {
    shoal_add_rms_norm(pool_, residual_, delta, weight, decoder_.eps, num_rows_, decoder_.hidden,
                       narrow_);
  }

  void attend(const shoal_layer& layer) {
    shoal_linear(pool_, &layer.qkv, narrow_, decoder_.hidden, num_rows_, wide_, qkv_size_);
    shoal_attend(pool_, &decoder_.heads, layer.keys, layer.values, step_.spans, step_.num_spans,
                 wide_, decoder_.cos, decoder_.sin, narrow_);
  }

  void keep_sampled() {
    for (int64_t i = 0; i < step_.num_sampled; ++i) {
      const int64_t row = step_.sampled_rows[i];
      move_row(residual_, row, i, decoder_.hidden);
      move_row(narrow_, row, i, q_size_);
    }
    num_rows_ = step_.num_sampled;
  }

  // Sampled rows ascend, so a row's new place is never one that is still needed.
  static void move_row(float* rows, int64_t from, int64_t to, int64_t size) {
    if (from == to) return;
    std::memcpy(rows + to * size, rows + from * size, size * sizeof(float));
  }

  // From attended rows to what the layer's FFN adds.
  bool finish(const shoal_layer& layer) {
    const int64_t hidden = decoder_.hidden, ffn = decoder_.ffn;
    shoal_linear(pool_, &layer.output, narrow_, q_size_, num_rows_, delta_, hidden);
    if (!all_reduce(delta_)) return false;
    norm(delta_, layer.ffn_norm);
    shoal_linear_swiglu(pool_, &layer.gate_up, narrow_, hidden, num_rows_, wide_, ffn);
    shoal_linear(pool_, &layer.down, wide_, ffn, num_rows_, delta_, hidden);
    return all_reduce(delta_);
  }

  bool sample() {
    norm(delta_, decoder_.final_norm);
    const int64_t num_ids = decoder_.head.num_outputs;
    const bool is_alone = collectives_.size == 1;
    float* own = is_alone ? step_.logits
                          : static_cast<float*>(scratch(
                                pool_, Scratch::kGathered,
                                num_rows_ * num_ids * int64_t{sizeof(float)}));
    shoal_linear(pool_, &decoder_.head, narrow_, decoder_.hidden, num_rows_, own, num_ids);
    return is_alone || gather(own, num_ids);
  }

  // Row by row, so that the ranks' parts of a row come to lie behind one another.
  bool gather(const float* own, int64_t num_ids) {
    const int64_t row_size = collectives_.size * num_ids;
    for (int64_t i = 0; i < num_rows_; ++i) {
      float* out = collectives_.rank == 0 ? step_.logits + i * row_size : nullptr;
      if (collectives_.gather(collectives_.context, own + i * num_ids, num_ids, out)) return false;
    }
    return true;
  }

  bool all_reduce(float* rows) {
    if (collectives_.size == 1) return true;
    return collectives_.all_reduce(collectives_.context, rows, num_rows_ * decoder_.hidden) == 0;
  }

  shoal_pool* pool_;
  const shoal_decoder& decoder_;
  const shoal_collectives& collectives_;
  const shoal_step& step_;
  int64_t num_rows_;
  int64_t q_size_;
  int64_t qkv_size_;
  float* residual_;
  float* delta_;
  float* narrow_;
  float* wide_;
};

}  // namespace
}  // namespace shoal

int shoal_forward(shoal_pool* pool, const shoal_decoder* decoder,
                  const shoal_collectives* collectives, const shoal_step* step) {
  return shoal::Pass(pool, *decoder, *collectives, *step).run() ? 0 : 1;
}
