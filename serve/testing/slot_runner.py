"""A model runner whose KV cache holds token ids, so that a wrong block is a wrong answer.

Not a model: each place of the pool keeps the token computed into it, and a sequence's next token is
chosen from what its block table reads back. A block that is shared too early, written by two, lost
or stale shows at once. The tests' slow twin of the real runner.
"""

from __future__ import annotations

import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from serve.messages import (
    Chunk,
    FinishedOutput,
    NewSequence,
    StepInput,
    StepOutput,
    TopLogprobs,
)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A sampled token, or why there is none."""

    token_id: int
    logprobs: TopLogprobs | None = None
    error: str | None = None


Choose = Callable[[NewSequence, list[int], np.ndarray | None], Chosen]
"""From a sequence's first appearance, all its tokens now and its mask, the next token."""


@dataclass(slots=True)
class _KnownSequence:
    new: NewSequence
    token_ids: list[int]
    block_ids: list[int]
    last_token_id: int = -1


class SlotRunner:
    """Runs steps over a pool of `num_total_blocks` blocks of `block_size` token ids.

    `num_starts` counts how often each sequence was new, by its prompt and seed: one more than its
    preemptions. `num_computed_tokens` counts tokens written, `max_step_tokens` those of the largest
    step.
    """

    def __init__(self, num_total_blocks: int, block_size: int, choose: Choose) -> None:
        self.num_starts: Counter[tuple[tuple[int, ...], int]] = Counter()
        self.num_computed_tokens = 0
        self.max_step_tokens = 0
        self._block_size = block_size
        self._choose = choose
        self._pool = [-1] * (num_total_blocks * block_size)
        self._num_holders = [0] * num_total_blocks
        self._known: dict[int, _KnownSequence] = {}
        self._started: StepInput | None = None
        self._sampled_slots: list[int] = []

    def start(self, step: StepInput) -> None:
        """Take over what changed and write the step's tokens into the pool."""
        assert self._started is None, "the step before was not sampled"
        self._started = step
        for slot in step.released:
            for block_id in self._known.pop(slot).block_ids:
                self._num_holders[block_id] -= 1
        for new in step.new:
            self._meet(new, next(chunk for chunk in step.chunks if chunk.slot == new.slot))
        for more in step.more_blocks:
            self._give(self._known[more.slot], more.block_ids)
        decodes = array("i", step.decodes).tolist()
        self._append(decodes, step.decode_token_ids)
        parts = [self._decode_chunk(slot) for slot in decodes] + step.chunks
        for part in parts:
            self._write(part)
        for part in parts:
            self._check_reads(part)
        self._sampled_slots = [part.slot for part in parts if part.is_sampled]
        num_tokens = sum(part.num_scheduled_tokens for part in parts)
        self.num_computed_tokens += num_tokens
        self.max_step_tokens = max(self.max_step_tokens, num_tokens)

    def sample(self, masks: Mapping[int, np.ndarray]) -> FinishedOutput:
        """Choose a token for each row from what the pool holds."""
        step, self._started = self._started, None
        assert step is not None, "no step was started"
        assert step.wants_masks or not masks
        assert masks.keys() <= set(self._sampled_slots)
        output = StepOutput(step.step_id, [], {}, {})
        for row, slot in enumerate(self._sampled_slots):
            known = self._known[slot]
            chosen = self._choose(known.new, list(known.token_ids), masks.get(slot))
            known.last_token_id = chosen.token_id
            output.token_ids.append(chosen.token_id)
            if chosen.error is not None:
                output.errors[row] = chosen.error
            if chosen.logprobs is not None:
                output.logprobs[row] = chosen.logprobs
        return FinishedOutput(output)

    def _meet(self, new: NewSequence, first: Chunk) -> None:
        assert new.slot not in self._known, "a slot is taken"
        self.num_starts[tuple(new.token_ids[: new.num_prompt_tokens]), new.sampling.seed] += 1
        known = self._known[new.slot] = _KnownSequence(new, list(new.token_ids), [])
        num_taken, rest = divmod(first.num_computed_tokens, self._block_size)
        assert rest == 0, "a part of a block is taken"
        for block_id in new.block_ids[:num_taken]:
            self._num_holders[block_id] += 1
        known.block_ids += new.block_ids[:num_taken]
        self._give(known, new.block_ids[num_taken:])

    def _give(self, known: _KnownSequence, block_ids: list[int]) -> None:
        """Blocks that nobody else reads: what they held is gone."""
        for block_id in block_ids:
            assert self._num_holders[block_id] == 0, "a block in use is given out"
            self._num_holders[block_id] = 1
            start = block_id * self._block_size
            self._pool[start : start + self._block_size] = [-1] * self._block_size
        known.block_ids += block_ids

    def _append(self, decodes: list[int], decode_token_ids: bytes) -> None:
        assert len(set(decodes)) == len(decodes)
        token_ids = array("i", decode_token_ids).tolist()
        if not token_ids:
            assert set(decodes) <= set(self._sampled_slots), "no token was sampled for a decode"
            token_ids = [self._known[slot].last_token_id for slot in decodes]
        for slot, token_id in zip(decodes, token_ids, strict=True):
            self._known[slot].token_ids.append(token_id)

    def _decode_chunk(self, slot: int) -> Chunk:
        return Chunk(slot, len(self._known[slot].token_ids) - 1, 1, True)

    def _write(self, part: Chunk) -> None:
        known = self._known[part.slot]
        end = part.num_computed_tokens + part.num_scheduled_tokens
        assert part.num_scheduled_tokens > 0
        assert part.is_sampled == (end == len(known.token_ids))
        for position in range(part.num_computed_tokens, end):
            place = self._place(known, position)
            assert self._pool[place] == -1, "a token is written twice, or into a shared block"
            self._pool[place] = known.token_ids[position]

    def _check_reads(self, part: Chunk) -> None:
        known = self._known[part.slot]
        end = part.num_computed_tokens + part.num_scheduled_tokens
        cached = [self._pool[self._place(known, position)] for position in range(end)]
        assert cached == known.token_ids[:end], "the KV cache is not the sequence's"

    def _place(self, known: _KnownSequence, position: int) -> int:
        block_id = known.block_ids[position // self._block_size]
        return block_id * self._block_size + position % self._block_size


def choose_by_hash(new: NewSequence, token_ids: list[int], mask: np.ndarray | None) -> Chosen:
    """An id in [2, 102) that depends on every token before it and the seed; no mask is obeyed."""
    return Chosen(2 + hash_tokens(token_ids, new.sampling.seed) % 100)


def hash_tokens(token_ids: list[int], seed: int) -> int:
    """A number in [0, 2^32) that depends on every token and the seed."""
    return zlib.crc32(array("q", [seed, *token_ids]).tobytes())
