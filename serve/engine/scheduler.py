"""Which sequences take part in the next step, with how many tokens and which KV blocks.

Not admission and not sampling. The one decision: strict order of arrival. Sequences start from
the front of the waiting queue, the youngest running one is preempted, and it goes back to the
front; so every running sequence is older than every waiting one, the oldest always advances, and
nothing starves::

    oldest                                                          youngest
    |------------- running (by seq_id) ---|------ waiting (by seq_id) ------|
      decoding | prefilling    preempt: the last -> <- start: the first

A step in which everybody just decodes touches a few integers of each sequence and builds nothing.
"""

from __future__ import annotations

from array import array
from collections import deque

from serve.messages import MoreBlocks, NewSequence, StepInput

from .block_manager import BlockManager
from .budget import TokenBudget
from .decodes import Decodes
from .schedule import Schedule
from .sequence import NO_SLOT, Sequence, SequenceState
from .settings import EngineSettings


class Scheduler:
    """Owns the waiting queue, the running list, the slots and the KV blocks."""

    def __init__(self, settings: EngineSettings) -> None:
        self.blocks = BlockManager(
            settings.num_total_blocks, settings.block_size, has_cache=settings.prefix_cache
        )
        self.budget = TokenBudget(
            settings.token_budget, settings.max_step_s, max_slowdown=settings.max_decode_slowdown
        )
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.max_running_sequences = min(settings.max_running_sequences, settings.token_budget)
        self.num_waiting_tokens = 0
        self.num_prompt_tokens_total = 0
        self.num_cache_query_tokens_total = 0
        self.num_cache_hit_tokens_total = 0
        self.num_preemptions_total = 0
        self.num_steps_total = 0
        self._has_lookahead = settings.lookahead
        self._free_slots = list(range(self.max_running_sequences - 1, -1, -1))
        self._released: list[int] = []
        self._prefilling: list[Sequence] = []
        self._decodes = Decodes()

    def add(self, sequence: Sequence) -> None:
        """Append a new sequence to the waiting queue."""
        self.waiting.append(sequence)
        self.num_waiting_tokens += len(sequence.token_ids)

    def remove(self, sequence: Sequence, *, is_sound: bool = True) -> None:
        """Finish a sequence in any state; its blocks are given back when this returns.

        What one that is not sound computed alone is not kept in the cache.
        """
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
            self._release(sequence, is_sound=is_sound)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            self.num_waiting_tokens -= len(sequence.token_ids)
        sequence.state = SequenceState.FINISHED

    def append_waiting(self, sequence: Sequence, token_id: int) -> None:
        """Append the token of a step in which `sequence` took part before it was preempted."""
        sequence.token_ids.append(token_id)
        self.num_waiting_tokens += 1

    def publish(self, sequence: Sequence, num_computed: int) -> None:
        """Let others share the full blocks of the first `num_computed` tokens from now on."""
        if sequence.keys is None:
            return
        block_ids = sequence.block_ids
        for position in range(
            sequence.num_published_blocks, num_computed // self.blocks.block_size
        ):
            key = sequence.keys.key(position, sequence.token_ids)
            parent_id = block_ids[position - 1] if position else None
            self.blocks.publish(block_ids[position], key, parent_id=parent_id)
            sequence.num_published_blocks += 1

    def schedule(self) -> tuple[Schedule, StepInput] | None:
        """The next step, or None where nothing can take part in one.

        Sequences that decode come first, then prompts already begun, then new ones while the
        token budget, the KV blocks and the limit on running sequences allow.
        """
        schedule = Schedule()
        num_preemptions = self.num_preemptions_total
        self._schedule_decodes(schedule)
        num_left = self.budget.prefill_tokens(len(schedule.decodes))
        if self._prefilling:
            num_left = self._schedule_prefills(schedule, num_left)
        if self.waiting and self.num_preemptions_total == num_preemptions:
            self._start_waiting(schedule, num_left)
        if schedule.num_tokens == 0:
            return None
        return schedule, self._step_input(schedule)

    def check_integrity(self) -> None:
        """Assert every invariant that joins queue, running list, slots and blocks."""
        self.blocks.check_integrity(sequence.block_ids for sequence in self.running)
        order = [sequence.seq_id for sequence in (*self.running, *self.waiting)]
        assert order == sorted(set(order)), "sequences are out of order"
        waiting_tokens = sum(len(sequence.token_ids) for sequence in self.waiting)
        assert self.num_waiting_tokens == waiting_tokens
        slots = [*self._free_slots, *(sequence.slot for sequence in self.running)]
        assert sorted(slots) == list(range(self.max_running_sequences)), "a slot is lost or shared"
        for sequence in self.running:
            assert sequence.state is SequenceState.RUNNING
            num_kv_slots = len(sequence.block_ids) * self.blocks.block_size
            assert sequence.num_computed_tokens <= num_kv_slots
            assert len(sequence.token_ids) <= num_kv_slots + 1
        for sequence in self.waiting:
            assert sequence.state in (SequenceState.WAITING, SequenceState.PREEMPTED)
            assert sequence.slot == NO_SLOT
            assert not sequence.block_ids
            assert sequence.num_computed_tokens == sequence.num_published_blocks == 0

    def _schedule_decodes(self, schedule: Schedule) -> None:
        """Schedule the next token of each sequence that decodes, oldest first.

        Where blocks run out the youngest is preempted, and that may be the one that asked: then
        all sequences before it are scheduled already. It cannot come back before the step in flight
        has given it its token, so nothing starts in the step that preempts.
        """
        decodes = self._decodes
        decodes.refresh()
        block_size = self.blocks.block_size
        num_preemptions = self.num_preemptions_total
        for sequence in decodes.sequences:
            num_computed = sequence.num_computed_tokens
            if num_computed == len(sequence.block_ids) * block_size:
                self._make_room(sequence)
                if sequence.state is not SequenceState.RUNNING:
                    break
                new_block_ids = self.blocks.allocate(1)
                sequence.block_ids += new_block_ids
                schedule.more_blocks.append(MoreBlocks(sequence.slot, new_block_ids))
            sequence.num_computed_tokens = num_computed + 1
            if num_computed + 2 >= sequence.max_len:  # it leaves after this step, whatever comes
                decodes.mark_stale()
        if self.num_preemptions_total > num_preemptions:
            decodes.leave_out_preempted()
        schedule.decodes = decodes.sequences
        schedule.num_tokens = len(decodes.sequences)

    def _make_room(self, sequence: Sequence) -> None:
        """Preempt the youngest until a block is free or `sequence` itself was preempted."""
        while self.blocks.num_available_blocks == 0 and _is_running(sequence):
            self._preempt_youngest()

    def _preempt_youngest(self) -> None:
        sequence = self.running.pop()
        self._release(sequence)
        sequence.state = SequenceState.PREEMPTED
        self.waiting.appendleft(sequence)
        self.num_waiting_tokens += len(sequence.token_ids)
        self.num_preemptions_total += 1

    def _release(self, sequence: Sequence, *, is_sound: bool = True) -> None:
        self._released.append(sequence.slot)
        self._free_slots.append(sequence.slot)
        self.blocks.free(sequence.block_ids, is_kept=is_sound)
        sequence.slot = NO_SLOT
        sequence.block_ids = []
        sequence.num_computed_tokens = sequence.num_published_blocks = 0
        self._decodes.mark_stale()

    def _schedule_prefills(self, schedule: Schedule, num_left: int) -> int:
        """Schedule the next chunk of each prompt already begun; returns the tokens left."""
        begun, self._prefilling = self._prefilling, []
        for sequence in begun:
            if not _is_running(sequence):
                continue
            num_tokens = min(sequence.num_prefill_tokens - sequence.num_computed_tokens, num_left)
            if num_tokens > 0:
                schedule.add_chunk(sequence, num_tokens)
            num_left -= num_tokens
            self._sort_in(sequence)
        return num_left

    def _sort_in(self, sequence: Sequence) -> None:
        if sequence.num_computed_tokens < sequence.num_prefill_tokens:
            self._prefilling.append(sequence)
        else:
            self._decodes.join(sequence)

    def _start_waiting(self, schedule: Schedule, num_left: int) -> None:
        while num_left > 0 and self.waiting and self._free_slots:
            sequence = self.waiting[0]
            if self._waits_for_sibling(sequence):
                break
            shared = self._find_room(sequence)
            if shared is None:
                break
            self.waiting.popleft()
            num_left -= self._start(schedule, sequence, shared, num_left)

    def _waits_for_sibling(self, sequence: Sequence) -> bool:
        """Whether another choice is about to compute the prompt's blocks for this one too."""
        sibling = sequence.sibling
        return (
            sibling is not None
            and _is_running(sibling)
            and sibling.num_published_blocks < self._num_shareable(sequence.num_prompt_tokens)
        )

    def _find_room(self, sequence: Sequence) -> list[int] | None:
        """Blocks that `sequence` shares if it starts now; None where the others have no room.

        There must be blocks for all its tokens, and some to grow into: a block for every running
        sequence halves the preemptions of a full pool, for 2 to 6 % more steps (simulated: 64
        clients, room for 3 to 5).
        """
        num_tokens = len(sequence.token_ids)
        shared: list[int] = []
        num_cached = 0
        if sequence.keys is not None:
            num_shareable = self._num_shareable(num_tokens)
            keys = sequence.keys.first(num_shareable, sequence.token_ids)
            shared, num_cached = self.blocks.find(keys)
        num_spare = self.blocks.num_available_blocks - num_cached
        num_spare -= self.blocks.num_blocks_for(num_tokens) - len(shared)
        return shared if num_spare >= len(self.running) else None

    def _num_shareable(self, num_tokens: int) -> int:
        """Full blocks before the last token, which is computed in any case: it is sampled."""
        return (num_tokens - 1) // self.blocks.block_size

    def _start(
        self, schedule: Schedule, sequence: Sequence, shared: list[int], num_left: int
    ) -> int:
        num_all = len(sequence.token_ids)
        num_shared = len(shared) * self.blocks.block_size
        self.num_waiting_tokens -= num_all
        if sequence.state is SequenceState.WAITING:
            self._count_start(sequence, num_shared)
        sequence.state = SequenceState.RUNNING
        sequence.slot = self._free_slots.pop()
        self.blocks.share(shared)
        num_new_blocks = self.blocks.num_blocks_for(num_all) - len(shared)
        sequence.block_ids = shared + self.blocks.allocate(num_new_blocks)
        sequence.num_published_blocks = len(shared)
        sequence.num_computed_tokens = num_shared
        sequence.num_prefill_tokens = num_all
        self.running.append(sequence)
        schedule.new.append(
            NewSequence(
                sequence.slot,
                list(sequence.token_ids),
                sequence.num_prompt_tokens,
                sequence.sampling,
                list(sequence.block_ids),
            )
        )
        num_tokens = min(num_all - num_shared, num_left)
        schedule.add_chunk(sequence, num_tokens)
        self._sort_in(sequence)
        return num_tokens

    def _count_start(self, sequence: Sequence, num_shared: int) -> None:
        self.num_prompt_tokens_total += sequence.num_prompt_tokens
        if sequence.keys is not None:
            self.num_cache_query_tokens_total += len(sequence.token_ids)
            self.num_cache_hit_tokens_total += num_shared
        if sequence.sibling is None:
            sequence.num_cached_tokens = min(num_shared, sequence.num_prompt_tokens)
        sequence.sibling = None

    def _step_input(self, schedule: Schedule) -> StepInput:
        released, self._released = self._released, []
        decode_token_ids = b""
        if schedule.decodes and not self._has_lookahead:
            decode_token_ids = array("i", [one.token_ids[-1] for one in schedule.decodes]).tobytes()
        schedule.wants_masks = self._decodes.has_grammar or any(
            one.matcher is not None for one in schedule.sampled
        )
        self.num_steps_total += 1
        return StepInput(
            self.num_steps_total - 1,
            released,
            schedule.new,
            schedule.more_blocks,
            self._decodes.slots,
            decode_token_ids,
            schedule.chunks,
            schedule.wants_masks,
        )


def _is_running(sequence: Sequence) -> bool:
    return sequence.state is SequenceState.RUNNING
