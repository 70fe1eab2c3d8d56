// A group in shared memory as one of its ranks sees it: tickets, waits, and how it breaks.
//
// Not what is sent (all_reduce.cpp). A rank counts up its own ticket and the others wait for it.
// The lowest bit of a ticket says that the group is broken: one load sees both, and the word that
// a sleeper watches changes. Nothing here is ever locked, so a rank may be killed anywhere.
#pragma once

#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

#include "pool.h"
#include "shoal.h"

namespace shoal::in_group {

// Some 5 us, then 1 ms of giving way, then sleep: the ranks of a step meet every some 100 us. Two
// ranks may share a core though there are enough: giving way costs half a microsecond, a long spin
// all of its time.
constexpr int kNumSpins = 200;
constexpr int64_t kYieldNs = 1000 * 1000;

constexpr int64_t kLine = 64;

constexpr uint32_t kBroken = 1;
constexpr uint32_t kPhase = 2;  // of a ticket: a piece is written, then summed
constexpr uint32_t kPiece = 2 * kPhase;

struct Contents {
  int64_t kind;
  int64_t num_values;  // of the whole collective
};

struct alignas(kLine) RankState {
  std::atomic<uint32_t> ticket;
  std::atomic<uint32_t> num_sleepers;
  Contents contents[2];
};

struct alignas(kLine) Header {
  std::atomic<uint32_t> failure;  // reason and rank, set once
};

inline int64_t slot_stride(int64_t num_slot_values) {
  return round_up(num_slot_values, kLine / static_cast<int64_t>(sizeof(float)));
}

inline int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000LL + now.tv_nsec;
}

// Not the private futex: ranks are processes.
inline void sleep_while(std::atomic<uint32_t>* word, uint32_t value, int64_t for_ns) {
  const timespec limit = {for_ns / 1000000000, for_ns % 1000000000};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT, value, &limit, nullptr, 0);
}

inline void wake_all(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace shoal::in_group

struct shoal_group {
  shoal::in_group::Header* header;
  shoal::in_group::RankState* states;  // [size]
  float* slots;                        // [size][2][stride]
  int32_t rank;
  int32_t size;
  int64_t num_slot_values;
  int64_t stride;
  std::atomic<int64_t> timeout_ns;
  int num_spins;
  uint32_t piece = 0;  // pieces begun before
};

namespace shoal::in_group {

enum class Seen { kNothing, kTicket, kBreak };

inline float* slot_of(const shoal_group* group, int32_t rank, uint32_t piece) {
  return group->slots + (2 * rank + piece % 2) * group->stride;
}

inline uint32_t written(uint32_t piece) { return piece * kPiece + kPhase; }
inline uint32_t summed(uint32_t piece) { return piece * kPiece + kPiece; }

inline void fail(shoal_group* group, uint32_t reason, int32_t rank) {
  uint32_t whole = SHOAL_WHOLE;
  group->header->failure.compare_exchange_strong(whole, reason << 16 | rank);
  for (int32_t other = 0; other < group->size; ++other) {
    group->states[other].ticket.fetch_or(kBroken);
    wake_all(&group->states[other].ticket);
  }
}

inline Seen look(uint32_t ticket, uint32_t target) {
  // Tickets wrap around; ranks are never more than two pieces apart. What a rank wrote before it
  // left counts, so that a group can end with a collective.
  if (static_cast<int32_t>(ticket - target) >= 0) return Seen::kTicket;
  return ticket & kBroken ? Seen::kBreak : Seen::kNothing;
}

inline Seen sleep_until(shoal_group* group, int32_t rank, uint32_t target) {
  RankState& state = group->states[rank];
  const int64_t deadline_ns = now_ns() + group->timeout_ns.load();
  Seen seen = Seen::kNothing;
  // The ticket is raised before sleepers are looked for: one of the two sides sees the other.
  state.num_sleepers.fetch_add(1);
  for (;;) {
    const uint32_t ticket = state.ticket.load();
    seen = look(ticket, target);
    if (seen != Seen::kNothing) break;
    const int64_t left_ns = deadline_ns - now_ns();
    if (left_ns <= 0) {
      fail(group, SHOAL_SILENT, rank);
      continue;
    }
    sleep_while(&state.ticket, ticket, left_ns);
  }
  state.num_sleepers.fetch_sub(1);
  return seen;
}

// Others may have written before this rank left: that would still be summed.
inline bool has_left(const shoal_group* group) {
  const uint32_t left = SHOAL_GONE << 16 | static_cast<uint32_t>(group->rank);
  return group->header->failure.load() == left;
}

// Waits until a rank's ticket is at least target; false where the group broke before.
inline bool wait_for(shoal_group* group, int32_t rank, uint32_t target) {
  const std::atomic<uint32_t>& ticket = group->states[rank].ticket;
  Seen seen = look(ticket.load(), target);
  for (int i = 0; seen == Seen::kNothing && i < group->num_spins; ++i) {
    _mm_pause();
    seen = look(ticket.load(), target);
  }
  if (seen == Seen::kNothing) {
    const int64_t until_ns = now_ns() + kYieldNs;
    do {
      sched_yield();
      seen = look(ticket.load(), target);
    } while (seen == Seen::kNothing && now_ns() < until_ns);
  }
  if (seen == Seen::kNothing) seen = sleep_until(group, rank, target);
  return seen == Seen::kTicket;
}

inline bool wait_for_others(shoal_group* group, uint32_t target) {
  for (int32_t rank = 0; rank < group->size; ++rank) {
    if (rank != group->rank && !wait_for(group, rank, target)) return false;
  }
  return true;
}

inline void raise_ticket(shoal_group* group, uint32_t by) {
  RankState& state = group->states[group->rank];
  state.ticket.fetch_add(by);
  if (state.num_sleepers.load() > 0) wake_all(&state.ticket);
}

}  // namespace shoal::in_group
