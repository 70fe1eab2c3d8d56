// From scores to one id: the inverse of the cumulative sum over ids by (score down, id up).
//
// Weights are e^((score - best) / temperature): the best one's is 1. Only as many ids are sorted as
// the draw needs: the best few hundred settle almost every draw. Where they do not, weights are
// summed by buckets of score, and one bucket is sorted.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>

#include "sampling_scores.h"

namespace shoal::sampling {

constexpr int64_t kNumFirstCandidates = 256;
constexpr int64_t kNumBuckets = 4096;
constexpr float kFarthest = 86.6f;  // (best - score) / temperature from where exp is 0
constexpr float kBucketsPerUnit = (kNumBuckets - 1) / kFarthest;

struct Candidate {
  float score;
  int32_t id;
};

inline bool comes_before(const Candidate& a, const Candidate& b) {
  return a.score != b.score ? a.score > b.score : a.id < b.id;
}

class Draw {
 public:
  static int64_t scratch_bytes(int64_t num_ids) {
    const int64_t num_padded = num_groups_of(num_ids) * kGroup;
    return kNumBuckets * sizeof(double) + num_padded * (sizeof(Candidate) + sizeof(float));
  }

  Draw(const Scores& scores, float temperature, void* scratch)
      : scores_(scores), temperature_(temperature) {
    bucket_totals_ = static_cast<double*>(scratch);
    candidates_ = reinterpret_cast<Candidate*>(bucket_totals_ + kNumBuckets);
    weights_ = reinterpret_cast<float*>(candidates_ + scores.num_groups() * kGroup);
  }

  // The best num_wanted ids in order, or all where there are fewer; their number.
  int64_t select(int64_t num_wanted) {
    const float bound = bound_of(num_wanted);
    const int64_t count = collect(bound);
    is_all_ = bound == kNever && count <= num_wanted;
    if (count > num_wanted) {
      std::nth_element(candidates_, candidates_ + num_wanted, candidates_ + count, comes_before);
    }
    return sort(std::min(count, num_wanted));
  }

  const Candidate* candidates() const { return candidates_; }

  // The sum of all weights of at least `least`.
  double sum_all(float least) const {
    double result = 0;
    float weights[kGroup];
    for (int64_t group = 0; group < scores_.num_groups(); ++group) {
      if (is_far(group)) continue;
      weigh(scores_.at_group(group), kGroup, weights);
      Vec part = zero();
      for (int64_t i = 0; i < kGroup; i += kLanes) {
        const Vec weight = load(weights + i);
        part = add(part, zero_where_less(weight, set1(least), weight));
      }
      result += sum(part);
    }
    return result;
  }

  int32_t draw(const shoal_sampling& how) {
    const int64_t count = select(how.top_k > 0 ? how.top_k : kNumFirstCandidates);
    weigh_candidates(count);
    const double sorted_total = sum_first(count);
    const double total = how.top_k > 0 || is_all_ ? sorted_total : sum_all(0);
    const int64_t num_kept = count_kept(how, count, total);
    const bool is_settled = num_kept < count || how.top_k > 0 || is_all_;
    if (is_settled) {
      const double kept_total = num_kept < count ? sum_first(num_kept) : total;
      return candidates_[find(num_kept, 0, how.number * kept_total, true).place].id;
    }
    const bool has_cut = how.top_p < 1 || how.min_p > 0;
    if (!has_cut && how.number * total < sorted_total) {
      return candidates_[find(count, 0, how.number * total, true).place].id;
    }
    return draw_from_all(how, total);
  }

 private:
  struct Found {
    int64_t place;
    double cumulative;
  };

  // As many groups as wanted have a best score of at least this, so at least as many ids do.
  float bound_of(int64_t num_wanted) {
    const int64_t num_groups = scores_.num_groups();
    if (num_wanted >= num_groups) return kNever;
    float* largest = weights_;
    std::copy_n(scores_.largest(), num_groups, largest);
    float* bound = largest + (num_wanted - 1);
    std::nth_element(largest, bound, largest + num_groups, std::greater<float>());
    return *bound;
  }

  // Finds the allowed ids with a score of at least `least`.
  int64_t collect(float least) {
    int64_t count = 0;
    for (int64_t group = 0; group < scores_.num_groups(); ++group) {
      if (scores_.largest()[group] < least || scores_.largest()[group] == kNever) continue;
      const float* scores = scores_.at_group(group);
      for (int64_t i = 0; i < kGroup; ++i) {
        candidates_[count] = {scores[i], static_cast<int32_t>(group * kGroup + i)};
        count += scores[i] >= least && scores[i] != kNever;
      }
    }
    return count;
  }

  int64_t sort(int64_t count) {
    std::sort(candidates_, candidates_ + count, comes_before);
    return count;
  }

  // All weights of the group are 0.
  bool is_far(int64_t group) const {
    return (scores_.best() - scores_.largest()[group]) / temperature_ > kFarthest + 1;
  }

  // In whole Vecs: out has room up to a multiple of kLanes, and so has scores.
  void weigh(const float* scores, int64_t count, float* out) const {
    const Vec best = set1(scores_.best()), temperature = set1(temperature_);
    for (int64_t i = 0; i < count; i += kLanes) {
      store(out + i, exp(div(sub(load(scores + i), best), temperature)));
    }
  }

  void weigh_candidates(int64_t count) {
    for (int64_t i = 0; i < count; ++i) weights_[i] = candidates_[i].score;
    std::fill(weights_ + count, weights_ + (count + kGroup - 1) / kGroup * kGroup, kNever);
    weigh(weights_, count, weights_);
  }

  double sum_first(int64_t count) const {
    double result = 0;
    for (int64_t i = 0; i < count; ++i) result += weights_[i];
    return result;
  }

  // Where the sum over the first candidates, begun at `before`, passes target; the last where none.
  Found find(int64_t count, double before, double target, bool is_strict) const {
    double cumulative = before;
    for (int64_t place = 0; place < count; ++place) {
      cumulative += weights_[place];
      if (is_strict ? cumulative > target : cumulative >= target) return {place, cumulative};
    }
    return {count - 1, cumulative};
  }

  // How many of the sorted candidates top_p and min_p keep: at least one.
  int64_t count_kept(const shoal_sampling& how, int64_t count, double total) const {
    int64_t num_kept = count;
    if (how.top_p < 1) {
      // The id that crosses top_p is kept.
      num_kept = find(count, 0, static_cast<double>(how.top_p) * total, false).place + 1;
    }
    if (how.min_p > 0) {
      int64_t num_likely = 0;
      while (num_likely < num_kept && weights_[num_likely] >= how.min_p) ++num_likely;
      num_kept = std::max<int64_t>(num_likely, 1);
    }
    return num_kept;
  }

  // A score's bucket is the whole part of its place: the farther from the best, the higher.
  Vec places(const float* scores) const {
    const Vec distance = div(sub(set1(scores_.best()), load(scores)), set1(temperature_));
    return mul(min(distance, set1(kFarthest)), set1(kBucketsPerUnit));
  }

  int32_t draw_from_all(const shoal_sampling& how, double total) {
    fill_buckets();
    double kept_total = total;
    if (how.top_p < 1) {
      kept_total = find_in_buckets(static_cast<double>(how.top_p) * total, false).cumulative;
    }
    if (how.min_p > 0) kept_total = std::min(kept_total, sum_all(how.min_p));
    // number is below 1, but its product may be rounded up.
    const double target = std::min(how.number * kept_total, std::nextafter(kept_total, 0.0));
    return candidates_[find_in_buckets(target, true).place].id;
  }

  void fill_buckets() {
    std::fill_n(bucket_totals_, kNumBuckets, 0.0);
    float weights[kGroup];
    float place[kGroup];
    for (int64_t group = 0; group < scores_.num_groups(); ++group) {
      if (is_far(group)) continue;
      const float* scores = scores_.at_group(group);
      weigh(scores, kGroup, weights);
      for (int64_t i = 0; i < kGroup; i += kLanes) store(place + i, places(scores + i));
      for (int64_t i = 0; i < kGroup; ++i) {
        bucket_totals_[static_cast<int32_t>(place[i])] += weights[i];
      }
    }
  }

  // Where the sum over all ids in order passes target; its place among the candidates, which are
  // those of one bucket.
  Found find_in_buckets(double target, bool is_strict) {
    int32_t last = 0;
    double before = 0, cumulative = 0;
    for (int32_t bucket = 0; bucket < kNumBuckets; ++bucket) {
      if (bucket_totals_[bucket] == 0) continue;
      last = bucket;
      before = cumulative;
      cumulative += bucket_totals_[bucket];
      if (is_strict ? cumulative > target : cumulative >= target) break;
    }
    const int64_t count = sort(collect_bucket(last));
    weigh_candidates(count);
    return find(count, before, target, is_strict);
  }

  int64_t collect_bucket(int32_t bucket) {
    const Vec one = set1(1.0f);
    const Vec first = set1(static_cast<float>(bucket)), next = set1(static_cast<float>(bucket + 1));
    int64_t count = 0;
    float is_inside[kGroup];
    for (int64_t group = 0; group < scores_.num_groups(); ++group) {
      if (scores_.largest()[group] == kNever) continue;
      const float* scores = scores_.at_group(group);
      Vec any = zero();
      for (int64_t i = 0; i < kGroup; i += kLanes) {
        const Vec place = places(scores + i);
        const Vec beyond = zero_where_less(place, next, one);
        const Vec inside = sub(zero_where_less(place, first, one), beyond);
        store(is_inside + i, inside);
        any = max(any, inside);
      }
      if (shoal::largest(any) == 0) continue;
      for (int64_t i = 0; i < kGroup; ++i) {
        candidates_[count] = {scores[i], static_cast<int32_t>(group * kGroup + i)};
        count += is_inside[i] != 0 && scores[i] != kNever;
      }
    }
    return count;
  }

  const Scores& scores_;
  float temperature_;
  bool is_all_ = false;      // whether the candidates are all there are
  double* bucket_totals_;    // [kNumBuckets]
  Candidate* candidates_;    // [num_groups * kGroup], in order
  float* weights_;           // [num_groups * kGroup], of the candidates
};

}  // namespace shoal::sampling
