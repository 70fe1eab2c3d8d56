// Batched sampling: a token for each row of logits, rows spread over the threads.
//
// A row is sampled by one thread from its own numbers alone, so neither its neighbours nor the
// number of threads can change it. What the steps mean is serve.runner.sampler's.
#include <cmath>
#include <cstdint>

#include "pool.h"
#include "sampling_draw.h"
#include "sampling_scores.h"
#include "shoal.h"

namespace shoal::sampling {
namespace {

constexpr float kMinTemperature = 1e-5f;  // below it the distribution is one token: the best

enum Error : int32_t { kNone = 0, kNotFinite = 1, kNothingAllowed = 2 };

// A thread's memory, first for the scores, then for the draw.
struct Workspace {
  char* scores;
  char* draw;
};

int64_t whole_lines(int64_t num_bytes) {
  return (num_bytes + kCacheLineBytes - 1) / kCacheLineBytes * kCacheLineBytes;
}

Error sample_row(const float* logits, int64_t num_ids, const shoal_sampling& how,
                 const Workspace& workspace, int32_t* token_id) {
  Scores scores(logits, num_ids, workspace.scores);
  scores.adjust(how);
  if (!scores.settle(how.mask, how.held_back_ids, how.num_held_back_ids)) return kNotFinite;
  if (scores.best() == kNever) return kNothingAllowed;
  if (how.temperature < kMinTemperature) {
    *token_id = scores.best_id();
  } else {
    *token_id = Draw(scores, how.temperature, workspace.draw).draw(how);
  }
  return kNone;
}

// The model's own: before penalties, masks and temperature.
void find_logprobs(const float* logits, int64_t num_ids, const Workspace& workspace,
                   int32_t token_id, int64_t num_top, float* logprob, int32_t* top_ids,
                   float* top_logprobs) {
  Scores scores(logits, num_ids, workspace.scores);
  scores.settle(nullptr, nullptr, 0);
  Draw all(scores, 1.0f, workspace.draw);
  const double log_total = scores.best() + std::log(all.sum_all(0));
  *logprob = static_cast<float>(logits[token_id] - log_total);
  const int64_t num_found = num_top > 0 ? all.select(num_top) : 0;
  for (int64_t i = 0; i < num_top; ++i) {
    const Candidate found = i < num_found ? all.candidates()[i] : Candidate{kNever, -1};
    top_ids[i] = found.id;
    top_logprobs[i] = static_cast<float>(found.score - log_total);
  }
}

}  // namespace
}  // namespace shoal::sampling

extern "C" void shoal_sample(shoal_pool* pool, const float* logits, int64_t stride,
                             int64_t num_ids, const shoal_sampling* rows, int64_t num_rows,
                             int32_t* token_ids, int32_t* errors, float* logprobs,
                             int32_t* top_ids, float* top_logprobs, int64_t max_logprobs) {
  using namespace shoal::sampling;
  const int64_t scores_bytes = whole_lines(Scores::scratch_bytes(num_ids));
  const int64_t thread_bytes = scores_bytes + whole_lines(Draw::scratch_bytes(num_ids));
  auto* memory = static_cast<char*>(
      shoal::scratch(pool, shoal::Scratch::kSampling, shoal_pool_size(pool) * thread_bytes));
  shoal::parallel(pool, num_rows, [&](int64_t row, int thread) {
    char* own = memory + thread * thread_bytes;
    const Workspace workspace = {own, own + scores_bytes};
    const float* row_logits = logits + row * stride;
    token_ids[row] = 0;
    errors[row] = sample_row(row_logits, num_ids, rows[row], workspace, &token_ids[row]);
    if (errors[row] != kNone || rows[row].num_logprobs < 0) return;
    find_logprobs(row_logits, num_ids, workspace, token_ids[row], rows[row].num_logprobs,
                  &logprobs[row], top_ids + row * max_logprobs, top_logprobs + row * max_logprobs);
  });
}
