"""A model runner whose KV cache holds token ids, so that a wrong block is a wrong answer.

Not a model: each slot of the pool keeps the token computed into it, and a sequence's next token is
chosen from what its block table reads back. A block that is shared, lost, too late or stale shows
at once. The tests' slow twin of the real runner.
"""

from __future__ import annotations

import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from serve.messages import NewSequence, SampledToken, ScheduledSequence, StepInput, StepOutput

Choose = Callable[[NewSequence, list[int], np.ndarray | None], SampledToken]
"""From a sequence's first appearance, all its tokens now and its mask, the next token."""


@dataclass(slots=True)
class _KnownSequence:
    new: NewSequence
    token_ids: list[int]
    block_ids: list[int]


class SlotRunner:
    """Runs steps over a pool of `num_total_blocks` blocks of `block_size` token ids.

    `num_starts` counts how often each sequence was new: one more than its preemptions.
    """

    def __init__(self, num_total_blocks: int, block_size: int, choose: Choose) -> None:
        self.num_starts: Counter[int] = Counter()
        self.max_step_tokens = 0
        self._block_size = block_size
        self._choose = choose
        self._slots = [-1] * (num_total_blocks * block_size)
        self._known: dict[int, _KnownSequence] = {}

    def execute(self, step: StepInput, masks: Mapping[int, np.ndarray]) -> StepOutput:
        """Write the scheduled tokens, then read back and choose for each sampled sequence."""
        for seq_id in step.released:
            for block_id in self._known.pop(seq_id).block_ids:
                start = block_id * self._block_size
                self._slots[start : start + self._block_size] = [-1] * self._block_size
        for new in step.new:
            self.num_starts[new.seq_id] += 1
            self._known[new.seq_id] = _KnownSequence(new, list(new.token_ids), [])
        for scheduled in step.scheduled:
            self._write(scheduled)
        num_tokens = sum(scheduled.num_scheduled_tokens for scheduled in step.scheduled)
        self.max_step_tokens = max(self.max_step_tokens, num_tokens)
        tokens = [self._sample(s.seq_id, masks) for s in step.scheduled if s.is_sampled]
        return StepOutput(step.step_id, tokens)

    def _write(self, scheduled: ScheduledSequence) -> None:
        known = self._known[scheduled.seq_id]
        known.token_ids += scheduled.new_token_ids
        known.block_ids += scheduled.new_block_ids
        end = scheduled.num_computed_tokens + scheduled.num_scheduled_tokens
        assert scheduled.num_scheduled_tokens > 0
        assert scheduled.is_sampled == (end == len(known.token_ids))
        for position in range(scheduled.num_computed_tokens, end):
            slot = self._slot(known, position)
            assert self._slots[slot] == -1, "a slot is written twice"
            self._slots[slot] = known.token_ids[position]

    def _sample(self, seq_id: int, masks: Mapping[int, np.ndarray]) -> SampledToken:
        known = self._known[seq_id]
        cached = [self._slots[self._slot(known, p)] for p in range(len(known.token_ids))]
        assert cached == known.token_ids, "the KV cache is not the sequence's"
        return self._choose(known.new, cached, masks.get(seq_id))

    def _slot(self, known: _KnownSequence, position: int) -> int:
        block_id = known.block_ids[position // self._block_size]
        return block_id * self._block_size + position % self._block_size


def choose_by_hash(new: NewSequence, token_ids: list[int], mask: np.ndarray | None) -> SampledToken:
    """An id in [2, 102) that depends on every token before it and the seed; no mask is obeyed."""
    return SampledToken(new.seq_id, 2 + hash_tokens(token_ids, new.sampling.seed) % 100)


def hash_tokens(token_ids: list[int], seed: int) -> int:
    """A number in [0, 2^32) that depends on every token and the seed."""
    return zlib.crc32(array("q", [seed, *token_ids]).tobytes())
