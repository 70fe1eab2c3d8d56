// How kernels share work between threads. See shoal_pool in shoal.h.
#pragma once

#include <cstdint>
#include <utility>

#include "shoal.h"

namespace shoal {

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

int num_usable_cores();  // of this process; threads and ranks beyond them do not spin

using TaskFunction = void (*)(void* context, int64_t index, int thread);

// Runs task(context, index, thread) once for every index in [0, num_tasks) and returns when all are
// done; thread is in [0, shoal_pool_size). Whoever is free takes the next index, so a result must
// not depend on the thread.
void run_tasks(shoal_pool* pool, int64_t num_tasks, TaskFunction task, void* context);

template <class Task>
void parallel(shoal_pool* pool, int64_t num_tasks, Task&& task) {
  run_tasks(
      pool, num_tasks,
      [](void* context, int64_t index, int thread) {
        (*static_cast<std::remove_reference_t<Task>*>(context))(index, thread);
      },
      const_cast<void*>(static_cast<const void*>(&task)));
}

// Memory that outlives a call and only grows, 64-byte aligned, one piece for each use. Its content is
// whatever the last call left. Not from inside a task.
enum class Scratch {
  kActivations,  // linear
  kAttention,
  kHidden,       // decoder: the residual stream and what layers make
  kGathered,     // decoder: logits before they are put together
  kSampling,
  kCount
};
void* scratch(shoal_pool* pool, Scratch use, int64_t num_bytes);

}  // namespace shoal
