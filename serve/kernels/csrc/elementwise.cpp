// Residual and norm in one pass over memory.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "pool.h"
#include "vec.h"

namespace shoal {
namespace {

constexpr int64_t kTaskValues = 1 << 14;  // a task's values: some microseconds

Vec load_first(const float* p, int64_t num_lanes) {
  float values[kLanes] = {};
  std::memcpy(values, p, num_lanes * sizeof(float));
  return load(values);
}

void store_first(float* p, Vec x, int64_t num_lanes) {
  float values[kLanes];
  store(values, x);
  std::memcpy(p, values, num_lanes * sizeof(float));
}

// residual[0, kLanes) += delta[0, kLanes); what stands there then.
Vec add_delta(float* residual, const float* delta) {
  Vec x = load(residual);
  if (delta == nullptr) return x;
  x = add(x, load(delta));
  store(residual, x);
  return x;
}

Vec add_first_deltas(float* residual, const float* delta, int64_t num_lanes) {
  Vec x = load_first(residual, num_lanes);
  if (delta == nullptr) return x;
  x = add(x, load_first(delta, num_lanes));
  store_first(residual, x, num_lanes);
  return x;
}

// Adds one row; its sum of squares. Four sums by turns, so that none waits for the one before; what
// is left over goes into the first.
float add_and_square(float* residual, const float* delta, int64_t hidden) {
  constexpr int kSums = 4;
  const auto delta_at = [delta](int64_t i) { return delta == nullptr ? nullptr : delta + i; };
  Vec sums[kSums] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kSums * kLanes <= hidden; i += kSums * kLanes) {
    for (int turn = 0; turn < kSums; ++turn) {
      const int64_t at = i + turn * kLanes;
      const Vec x = add_delta(residual + at, delta_at(at));
      sums[turn] = fma(x, x, sums[turn]);
    }
  }
  for (; i + kLanes <= hidden; i += kLanes) {
    const Vec x = add_delta(residual + i, delta_at(i));
    sums[0] = fma(x, x, sums[0]);
  }
  if (i < hidden) {
    const Vec x = add_first_deltas(residual + i, delta_at(i), hidden - i);
    sums[0] = fma(x, x, sums[0]);
  }
  return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

void add_rms_norm(float* residual, const float* delta, const float* weight, float eps,
                  int64_t hidden, float* out) {
  const float square = add_and_square(residual, delta, hidden);
  const Vec scale = set1(1.0f / std::sqrt(square / static_cast<float>(hidden) + eps));
  int64_t i = 0;
  for (; i + kLanes <= hidden; i += kLanes) {
    store(out + i, mul(mul(load(residual + i), scale), load(weight + i)));
  }
  if (i < hidden) {
    const Vec x = mul(load_first(residual + i, hidden - i), scale);
    store_first(out + i, mul(x, load_first(weight + i, hidden - i)), hidden - i);
  }
}

}  // namespace
}  // namespace shoal

extern "C" void shoal_add_rms_norm(shoal_pool* pool, float* residual, const float* delta,
                                   const float* weight, float eps, int64_t num_rows,
                                   int64_t hidden, float* out) {
  const int64_t task_rows = std::max<int64_t>(1, shoal::kTaskValues / hidden);
  const int64_t num_tasks = (num_rows + task_rows - 1) / task_rows;
  shoal::parallel(pool, num_tasks, [&](int64_t index, int) {
    const int64_t end = std::min(num_rows, (index + 1) * task_rows);
    for (int64_t row = index * task_rows; row < end; ++row) {
      const int64_t at = row * hidden;
      shoal::add_rms_norm(residual + at, delta == nullptr ? nullptr : delta + at, weight, eps,
                          hidden, out + at);
    }
  });
}
