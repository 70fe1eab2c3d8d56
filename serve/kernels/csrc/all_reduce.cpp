// All-reduce and gather of a group in shared memory.
//
// Each rank writes to slots of its own and counts up its ticket; the others wait for the ticket,
// then read the slot. Values longer than a slot go in pieces, which take two slots in turn: whoever
// has written piece p has read piece p - 1, so slot p % 2 is free for piece p + 2 when every rank
// has written p + 1, and nobody ever waits to be read. A rank sums in rank order, so all have the
// same bits.
#include <algorithm>
#include <cstring>

#include "group.h"
#include "shoal.h"

namespace shoal::in_group {
namespace {

// From here on ranks share the summation: each one sums a part, then all copy the parts.
constexpr int64_t kMinShared = 16384;
constexpr int kMinSharingRanks = 3;  // two ranks would read as much as before

constexpr int64_t kBlock = 1024;  // values summed at a time

enum Kind : int64_t { kAllReduce = 1, kGather = 2 };

bool has_joined(shoal_group* group, int32_t rank, uint32_t piece, const Contents& expected) {
  if (!wait_for(group, rank, written(piece))) return false;
  const Contents& found = group->states[rank].contents[piece % 2];
  if (found.kind == expected.kind && found.num_values == expected.num_values) return true;
  fail(group, SHOAL_OUT_OF_STEP, rank);
  return false;
}

bool have_joined(shoal_group* group, uint32_t piece, const Contents& expected) {
  for (int32_t rank = 0; rank < group->size; ++rank) {
    if (rank != group->rank && !has_joined(group, rank, piece, expected)) return false;
  }
  return true;
}

// Puts values into this rank's slot, once everybody has read what lay there.
bool write_piece(shoal_group* group, uint32_t piece, const Contents& contents, const float* x,
                 int64_t num_values) {
  if (!wait_for_others(group, written(piece - 1))) return false;
  group->states[group->rank].contents[piece % 2] = contents;
  if (num_values > 0) {
    std::memcpy(slot_of(group, group->rank, piece), x, num_values * sizeof(float));
  }
  return true;
}

// out = the sum over ranks, in their order, of values [first, last) of their slots. out may be such
// values itself.
void sum_slots(const shoal_group* group, uint32_t piece, int64_t first, int64_t last, float* out) {
  float total[kBlock];
  for (int64_t begin = first; begin < last; begin += kBlock) {
    const int64_t count = std::min(kBlock, last - begin);
    std::memcpy(total, slot_of(group, 0, piece) + begin, count * sizeof(float));
    for (int32_t rank = 1; rank < group->size; ++rank) {
      const float* __restrict part = slot_of(group, rank, piece) + begin;
      for (int64_t i = 0; i < count; ++i) total[i] += part[i];
    }
    std::memcpy(out + (begin - first), total, count * sizeof(float));
  }
}

int64_t share_begin(const shoal_group* group, int64_t num_values, int32_t rank) {
  const int64_t share = round_up((num_values + group->size - 1) / group->size, kLine);
  return std::min(num_values, rank * share);
}

// Every rank sums its share in place, in a part of its slot that no other rank reads, then copies.
bool sum_in_shares(shoal_group* group, uint32_t piece, float* x, int64_t num_values) {
  const int64_t first = share_begin(group, num_values, group->rank);
  const int64_t last = share_begin(group, num_values, group->rank + 1);
  sum_slots(group, piece, first, last, slot_of(group, group->rank, piece) + first);
  raise_ticket(group, kPhase);
  if (!wait_for_others(group, summed(piece))) return false;
  for (int32_t rank = 0; rank < group->size; ++rank) {
    const int64_t begin = share_begin(group, num_values, rank);
    const int64_t end = share_begin(group, num_values, rank + 1);
    std::memcpy(x + begin, slot_of(group, rank, piece) + begin, (end - begin) * sizeof(float));
  }
  return true;
}

bool all_reduce_piece(shoal_group* group, const Contents& contents, float* x, int64_t num_values) {
  const uint32_t piece = group->piece++;
  const bool is_shared = group->size >= kMinSharingRanks && num_values >= kMinShared;
  if (!write_piece(group, piece, contents, x, num_values)) return false;
  raise_ticket(group, is_shared ? kPhase : kPiece);
  if (!have_joined(group, piece, contents)) return false;
  if (is_shared) return sum_in_shares(group, piece, x, num_values);
  sum_slots(group, piece, 0, num_values, x);
  return true;
}

bool send_piece(shoal_group* group, const Contents& contents, const float* x,
                int64_t num_values) {
  const uint32_t piece = group->piece++;
  if (!write_piece(group, piece, contents, x, num_values)) return false;
  raise_ticket(group, kPiece);
  return true;
}

// Rank 0: out [size rows, contents.num_values apart] gets the others' piece at its place.
bool receive_piece(shoal_group* group, const Contents& contents, float* out, int64_t num_values) {
  const uint32_t piece = group->piece++;
  raise_ticket(group, kPiece);
  for (int32_t rank = 1; rank < group->size; ++rank) {
    if (!has_joined(group, rank, piece, contents)) return false;
    if (num_values == 0) continue;
    std::memcpy(out + rank * contents.num_values, slot_of(group, rank, piece),
                num_values * sizeof(float));
  }
  return true;
}

// Calls take_part(offset, count) for each piece of num_values, once where there are none.
template <class TakePart>
int in_pieces(const shoal_group* group, int64_t num_values, TakePart take_part) {
  if (has_left(group)) return 1;
  int64_t offset = 0;
  do {
    const int64_t count = std::min(group->num_slot_values, num_values - offset);
    if (!take_part(offset, count)) return 1;
    offset += count;
  } while (offset < num_values);
  return 0;
}

}  // namespace
}  // namespace shoal::in_group

extern "C" {

using namespace shoal::in_group;

int64_t shoal_group_bytes(int32_t size, int64_t num_slot_values) {
  const int64_t slots = 2 * size * slot_stride(num_slot_values);
  return static_cast<int64_t>(sizeof(Header) + size * sizeof(RankState) + slots * sizeof(float));
}

shoal_group* shoal_group_join(void* memory, int32_t rank, int32_t size, int64_t num_slot_values,
                              int64_t timeout_ms) {
  auto* group = new shoal_group;
  group->header = static_cast<Header*>(memory);
  group->states = reinterpret_cast<RankState*>(group->header + 1);
  group->slots = reinterpret_cast<float*>(group->states + size);
  group->rank = rank;
  group->size = size;
  group->num_slot_values = num_slot_values;
  group->stride = slot_stride(num_slot_values);
  group->timeout_ns = timeout_ms * 1000000;
  group->num_spins = shoal::num_usable_cores() < size ? 0 : kNumSpins;
  return group;
}

void shoal_group_limit_silence(shoal_group* group, int64_t timeout_ms) {
  group->timeout_ns = timeout_ms * 1000000;
}

void shoal_group_leave(shoal_group* group) { delete group; }

void shoal_group_break(shoal_group* group, int32_t gone_rank) {
  fail(group, SHOAL_GONE, gone_rank);
}

int shoal_group_failure(const shoal_group* group, int32_t* rank) {
  const uint32_t failure = group->header->failure.load();
  *rank = static_cast<int32_t>(failure & 0xffff);
  return static_cast<int>(failure >> 16);
}

int shoal_group_all_reduce(void* context, float* x, int64_t num_values) {
  auto* group = static_cast<shoal_group*>(context);
  const Contents contents = {kAllReduce, num_values};
  return in_pieces(group, num_values, [&](int64_t offset, int64_t count) {
    return all_reduce_piece(group, contents, x + offset, count);
  });
}

int shoal_group_gather(void* context, const float* x, int64_t num_values, float* out) {
  auto* group = static_cast<shoal_group*>(context);
  const Contents contents = {kGather, num_values};
  if (group->rank == 0 && num_values > 0) std::memcpy(out, x, num_values * sizeof(float));
  return in_pieces(group, num_values, [&](int64_t offset, int64_t count) {
    return group->rank == 0 ? receive_piece(group, contents, out + offset, count)
                            : send_piece(group, contents, x + offset, count);
  });
}

}  // extern "C"
