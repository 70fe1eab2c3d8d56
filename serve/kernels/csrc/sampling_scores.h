// One row of logits as it is sampled: penalties, biases and masks over the model's own.
//
// Ids lie in groups of kGroup. A group that differs from the logits is copied first; all others are
// read where they are, so a row without penalties is never written. The one decision behind it: the
// largest score of each group is kept, and every later step looks only at groups that matter to it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "shoal.h"
#include "vec.h"

namespace shoal::sampling {

constexpr int64_t kGroup = 64;
constexpr float kNever = -std::numeric_limits<float>::infinity();  // an id that is not allowed

inline int64_t num_groups_of(int64_t num_ids) { return (num_ids + kGroup - 1) / kGroup; }

struct Group {
  float largest;
  bool is_finite;  // neither NaN nor +infinity
};

inline Group inspect(const float* values) {
  Vec largest = load(values), wrong = zero();
  for (int64_t i = 0; i < kGroup; i += kLanes) {
    const Vec x = load(values + i);
    largest = max(x, largest);
    const Vec infinity = set1(std::numeric_limits<float>::infinity());
    wrong = max(zero_where_less(x, infinity, set1(1.0f)), wrong);
  }
  return {shoal::largest(largest), shoal::largest(wrong) == 0.0f};
}

class Scores {
 public:
  // What a row needs beside its logits. Nothing of it is kept from row to row.
  static int64_t scratch_bytes(int64_t num_ids) {
    const int64_t num_groups = num_groups_of(num_ids);
    return num_groups * (kGroup * sizeof(float) + sizeof(uint64_t) + sizeof(float) + sizeof(bool));
  }

  Scores(const float* logits, int64_t num_ids, void* scratch)
      : logits_(logits), num_ids_(num_ids), num_groups_(num_groups_of(num_ids)) {
    copies_ = static_cast<float*>(scratch);
    is_penalized_ = reinterpret_cast<uint64_t*>(copies_ + num_groups_ * kGroup);
    largest_ = reinterpret_cast<float*>(is_penalized_ + num_groups_);
    is_copied_ = reinterpret_cast<bool*>(largest_ + num_groups_);
    std::fill_n(is_copied_, num_groups_, false);
    // The last group is filled up with ids that are not allowed.
    if (num_ids % kGroup) copy(num_groups_ - 1);
  }

  // Penalties, then biases, in the order of serve.runner.sampler.
  void adjust(const shoal_sampling& how) {
    if (how.repetition_penalty != 1.0f) penalize_repetition(how);
    if (how.presence_penalty != 0.0f || how.frequency_penalty != 0.0f) {
      for (int64_t i = 0; i < how.num_output_ids; ++i) {
        if (!exists(how.output_ids[i])) continue;
        const float frequency = static_cast<float>(how.output_counts[i]) * how.frequency_penalty;
        at(how.output_ids[i]) -= frequency + how.presence_penalty;
      }
    }
    for (int64_t i = 0; i < how.num_biases; ++i) {
      if (exists(how.bias_ids[i])) at(how.bias_ids[i]) += how.biases[i];
    }
  }

  // Takes away what is not allowed and finds the largest scores. False where the logits are not
  // finite: a NaN, +infinity or nothing but -infinity.
  bool settle(const uint32_t* mask, const int32_t* held_back_ids, int64_t num_held_back_ids) {
    bool is_finite = true;
    float largest = kNever;
    for (int64_t group = 0; group < num_groups_; ++group) {
      const Group found = inspect(at_group(group));
      is_finite &= found.is_finite;
      largest = std::max(largest, found.largest);
      largest_[group] = mask == nullptr ? found.largest : allow(group, mask, found.largest);
    }
    for (int64_t i = 0; i < num_held_back_ids; ++i) {
      if (!exists(held_back_ids[i])) continue;
      at(held_back_ids[i]) = kNever;
      const int64_t group = held_back_ids[i] / kGroup;
      if (largest_[group] != kNever) largest_[group] = inspect(at_group(group)).largest;
    }
    best_ = *std::max_element(largest_, largest_ + num_groups_);
    return is_finite && largest != kNever;
  }

  int64_t num_groups() const { return num_groups_; }
  // After settle.
  float best() const { return best_; }
  const float* largest() const { return largest_; }  // [num_groups]

  // The scores of a group. Where its largest is kNever they may be anything.
  const float* at_group(int64_t group) const {
    return (is_copied_[group] ? copies_ : logits_) + group * kGroup;
  }

  // The first id with the best score.
  int32_t best_id() const {
    const int64_t group = std::find(largest_, largest_ + num_groups_, best_) - largest_;
    const float* scores = at_group(group);
    const int64_t place = std::find(scores, scores + kGroup, best_) - scores;
    return static_cast<int32_t>(group * kGroup + place);
  }

 private:
  bool exists(int32_t id) const { return id >= 0 && id < num_ids_; }

  void copy(int64_t group) {
    const int64_t first = group * kGroup;
    const int64_t count = std::min(kGroup, num_ids_ - first);
    std::memcpy(copies_ + first, logits_ + first, count * sizeof(float));
    std::fill(copies_ + first + count, copies_ + first + kGroup, kNever);
    is_copied_[group] = true;
  }

  float& at(int32_t id) {
    if (!is_copied_[id / kGroup]) copy(id / kGroup);
    return copies_[id];
  }

  // Each id of prompt and output once, though both may have it.
  void penalize_repetition(const shoal_sampling& how) {
    std::fill_n(is_penalized_, num_groups_, 0);
    const auto penalize = [&](const int32_t* ids, int64_t num_ids) {
      for (int64_t i = 0; i < num_ids; ++i) {
        if (!exists(ids[i])) continue;
        const uint64_t bit = uint64_t{1} << (ids[i] % kGroup);
        if (is_penalized_[ids[i] / kGroup] & bit) continue;
        is_penalized_[ids[i] / kGroup] |= bit;
        float& score = at(ids[i]);
        score = score > 0 ? score / how.repetition_penalty : score * how.repetition_penalty;
      }
    };
    penalize(how.prompt_ids, how.num_prompt_ids);
    penalize(how.output_ids, how.num_output_ids);
  }

  // Keeps the allowed ids of a group; the largest of them.
  float allow(int64_t group, const uint32_t* mask, float largest) {
    const int64_t num_words = (num_ids_ + 31) / 32;
    uint64_t allowed = mask[2 * group];
    if (2 * group + 1 < num_words) allowed |= uint64_t{mask[2 * group + 1]} << 32;
    if (allowed == 0) return kNever;
    if (allowed == ~uint64_t{0}) return largest;
    if (!is_copied_[group]) copy(group);
    float* scores = copies_ + group * kGroup;
    for (int64_t i = 0; i < kGroup; ++i) {
      scores[i] = allowed >> i & 1 ? scores[i] : kNever;
    }
    return inspect(scores).largest;
  }

  const float* logits_;
  int64_t num_ids_;
  int64_t num_groups_;
  float* copies_;           // [num_groups * kGroup], where is_copied_
  uint64_t* is_penalized_;  // [num_groups], a bit an id
  float* largest_;          // [num_groups]
  bool* is_copied_;         // [num_groups]
  float best_ = kNever;
};

}  // namespace shoal::sampling
