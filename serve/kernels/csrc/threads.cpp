// Threads that share a step's work.
//
// A job is announced by a ticket: its number in the upper half, the next index in the lower. Whoever
// is free takes an index by raising the ticket, so a thread that the system has not scheduled holds
// nothing up, and one that comes late finds either the ticket it read or a newer one. Idle threads
// spin, then yield, then sleep; where there are fewer cores than threads they do not spin.
#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <csignal>
#include <cstdlib>
#include <vector>

#include "pool.h"

namespace {

// About 50 us and some hundred more: kernels of a step follow each other faster than that.
constexpr int kNumSpins = 2000;
constexpr int kNumYields = 200;

constexpr uint32_t kStop = 1u << 31;  // in place of a number of tasks

struct Member;

void sleep_while(std::atomic<uint32_t>* word, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT_PRIVATE, value, nullptr, nullptr,
          0);
}

void wake_all(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr,
          nullptr, 0);
}

}  // namespace

struct shoal_pool {
  // The job. Written only between jobs, when every index of the last one was taken and done.
  std::atomic<shoal::TaskFunction> task{nullptr};
  std::atomic<void*> context{nullptr};
  std::atomic<uint32_t> num_tasks{0};

  alignas(64) std::atomic<uint64_t> ticket{0};
  alignas(64) std::atomic<uint32_t> num_done{0};
  std::atomic<uint32_t> caller_sleeps{0};
  alignas(64) std::atomic<uint32_t> announced{0};  // the ticket's upper half, to sleep on
  std::atomic<uint32_t> num_sleepers{0};

  uint32_t job = 0;
  int num_spins = kNumSpins;
  std::vector<Member> members;

  struct Piece {
    void* memory = nullptr;
    int64_t num_bytes = 0;
  };
  Piece pieces[static_cast<int>(shoal::Scratch::kCount)];
};

namespace {

struct Member {
  shoal_pool* pool;
  int thread;
  pthread_t handle;
};

// Spins, then yields, then sleeps on word while it holds value and until is_over().
template <class IsOver>
void wait(int num_spins, std::atomic<uint32_t>* word, std::atomic<uint32_t>* sleepers,
          IsOver is_over) {
  for (int i = 0; i < num_spins; ++i) {
    if (is_over()) return;
    _mm_pause();
  }
  for (int i = 0; i < kNumYields; ++i) {
    if (is_over()) return;
    sched_yield();
  }
  // Whoever ends the wait changes word first and looks for sleepers then: one of both is seen.
  sleepers->fetch_add(1);
  for (;;) {
    const uint32_t value = word->load();
    if (is_over()) break;
    sleep_while(word, value);
  }
  sleepers->fetch_sub(1);
}

// Takes indices of the job that the ticket shows until none is left; that job's number.
uint32_t work(shoal_pool* pool, int thread) {
  uint64_t ticket = pool->ticket.load();
  for (;;) {
    const auto index = static_cast<uint32_t>(ticket);
    const shoal::TaskFunction task = pool->task.load();
    void* context = pool->context.load();
    const uint32_t num_tasks = pool->num_tasks.load();
    if (num_tasks == kStop || index >= num_tasks) return static_cast<uint32_t>(ticket >> 32);
    // The ticket is still the one read: task, context and num_tasks belong to it.
    if (!pool->ticket.compare_exchange_weak(ticket, ticket + 1)) continue;
    task(context, index, thread);
    if (pool->num_done.fetch_add(1) + 1 == num_tasks && pool->caller_sleeps.load()) {
      wake_all(&pool->num_done);
    }
    ticket = pool->ticket.load();
  }
}

void announce(shoal_pool* pool, uint32_t num_tasks, shoal::TaskFunction task, void* context) {
  // Nobody may take an index of the last job once num_tasks changes.
  pool->ticket.store(static_cast<uint64_t>(pool->job) << 32 | UINT32_MAX);
  pool->task.store(task);
  pool->context.store(context);
  pool->num_tasks.store(num_tasks);
  pool->num_done.store(0);
  ++pool->job;
  pool->ticket.store(static_cast<uint64_t>(pool->job) << 32);
  pool->announced.store(pool->job);
  if (pool->num_sleepers.load()) wake_all(&pool->announced);
}

void* run_member(void* argument) {
  const auto* member = static_cast<Member*>(argument);
  shoal_pool* pool = member->pool;
  for (;;) {
    const uint32_t finished = work(pool, member->thread);
    if (pool->num_tasks.load() == kStop) return nullptr;
    wait(pool->num_spins, &pool->announced, &pool->num_sleepers, [pool, finished] {
      return static_cast<uint32_t>(pool->ticket.load() >> 32) != finished;
    });
  }
}

}  // namespace

namespace shoal {

int num_usable_cores() {
  cpu_set_t cores;
  return sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
}

void run_tasks(shoal_pool* pool, int64_t num_tasks, TaskFunction task, void* context) {
  if (pool->members.empty() || num_tasks == 1) {
    for (int64_t index = 0; index < num_tasks; ++index) task(context, index, 0);
    return;
  }
  if (num_tasks <= 0) return;
  announce(pool, static_cast<uint32_t>(num_tasks), task, context);
  work(pool, 0);
  wait(pool->num_spins, &pool->num_done, &pool->caller_sleeps, [pool, num_tasks] {
    return pool->num_done.load() == static_cast<uint32_t>(num_tasks);
  });
}

void* scratch(shoal_pool* pool, Scratch use, int64_t num_bytes) {
  shoal_pool::Piece& piece = pool->pieces[static_cast<int>(use)];
  if (piece.num_bytes < num_bytes) {
    const int64_t wanted = num_bytes > 2 * piece.num_bytes ? num_bytes : 2 * piece.num_bytes;
    const int64_t rounded = (wanted + 4095) / 4096 * 4096;
    std::free(piece.memory);
    piece.memory = std::aligned_alloc(64, static_cast<size_t>(rounded));
    if (piece.memory == nullptr) std::abort();
    piece.num_bytes = rounded;
  }
  return piece.memory;
}

}  // namespace shoal

extern "C" {

shoal_pool* shoal_pool_new(int num_threads) {
  auto* pool = new shoal_pool;
  if (num_threads > shoal::num_usable_cores()) pool->num_spins = 0;
  pool->members.resize(num_threads > 1 ? num_threads - 1 : 0);
  // Signals are for the threads that the program knows of.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int num_started = 0;
  for (Member& member : pool->members) {
    member = {pool, num_started + 1, {}};
    if (pthread_create(&member.handle, nullptr, run_member, &member) != 0) break;
    ++num_started;
  }
  pool->members.resize(num_started);  // fewer than wanted where the system allows no more
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return pool;
}

void shoal_pool_delete(shoal_pool* pool) {
  if (pool == nullptr) return;
  announce(pool, kStop, nullptr, nullptr);
  for (const Member& member : pool->members) pthread_join(member.handle, nullptr);
  for (const shoal_pool::Piece& piece : pool->pieces) std::free(piece.memory);
  delete pool;
}

int shoal_pool_size(const shoal_pool* pool) { return static_cast<int>(pool->members.size()) + 1; }

}  // extern "C"
