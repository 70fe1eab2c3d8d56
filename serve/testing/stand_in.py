"""A model runner without a model: every step takes a given time, every token is a pure function.

Not a mock: it keeps each sequence's tokens exactly as the real runner does, so a scheduler that
breaks the protocol of steps fails here too. The token at an output position depends only on the
prompt, the seed and that position, so a stream says by itself whose it is and where it stands.
"""

from __future__ import annotations

import time
import zlib
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from serve.messages import FinishedOutput, NewSequence, StepInput, StepOutput
from serve.seeds import uniform

# In a byte-level vocabulary these are printable ASCII, with up to 32 special ids before the bytes.
_FIRST_ID = 32
_NUM_IDS = 62


@dataclass(slots=True)
class _KnownSequence:
    key: int
    num_tokens: int
    num_prompt_tokens: int
    num_blocks: int


class StandInRunner:
    """Takes `step_s` a step; owns `num_total_blocks` blocks of no memory.

    A step's time runs from its start: `sample` sleeps for what is left of it. Tokens are ids in
    [32, 94), or [0, `vocab_size`) where that is smaller; the first allowed id where a mask forbids
    the one chosen. It never chooses an end of sequence by itself, and no token depends on another.
    """

    def __init__(
        self,
        step_s: float,
        num_total_blocks: int,
        vocab_size: int,
        *,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.step_s = step_s
        self.num_total_blocks = num_total_blocks
        self.vocab_size = vocab_size
        self._sleep = sleep
        self._clock = clock
        self._known: dict[int, _KnownSequence] = {}
        self._first_id = _FIRST_ID if vocab_size >= _FIRST_ID + _NUM_IDS else 0
        self._num_ids = min(_NUM_IDS, vocab_size)
        self._ends_s = 0.0
        self._step_id = -1
        self._sampled_slots: list[int] = []

    def start(self, step: StepInput) -> None:
        """Take over what changed; see `serve.messages.StepInput` for the order on arrival."""
        self._ends_s = self._clock() + self.step_s
        self._step_id = step.step_id
        for slot in step.released:
            del self._known[slot]
        for new in step.new:
            self._known[new.slot] = _meet(new)
        for more in step.more_blocks:
            self._known[more.slot].num_blocks += len(more.block_ids)
        self._sampled_slots = array("i", step.decodes).tolist()
        for slot in self._sampled_slots:
            self._known[slot].num_tokens += 1
        for chunk in step.chunks:
            known = self._known[chunk.slot]
            end = chunk.num_computed_tokens + chunk.num_scheduled_tokens
            assert chunk.is_sampled == (end == known.num_tokens)
            if chunk.is_sampled:
                self._sampled_slots.append(chunk.slot)
        assert all(known.num_blocks <= self.num_total_blocks for known in self._known.values())

    def sample(self, masks: Mapping[int, np.ndarray]) -> FinishedOutput:
        """Wait for the end of the step and choose its tokens."""
        left_s = self._ends_s - self._clock()
        if left_s > 0:
            self._sleep(left_s)
        token_ids = [self._choose(self._known[s], masks.get(s)) for s in self._sampled_slots]
        return FinishedOutput(StepOutput(self._step_id, token_ids))

    def _choose(self, known: _KnownSequence, mask: np.ndarray | None) -> int:
        position = known.num_tokens - known.num_prompt_tokens
        token_id = self._first_id + int(uniform(known.key, position) * self._num_ids)
        if mask is not None:
            allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")
            token_id = token_id if allowed[token_id] else int(allowed.argmax())
        return token_id


def _meet(new: NewSequence) -> _KnownSequence:
    prompt = array("I", new.token_ids[: new.num_prompt_tokens])
    key = zlib.crc32(prompt.tobytes()) ^ new.sampling.seed
    num_blocks = len(new.block_ids)
    return _KnownSequence(key, len(new.token_ids), new.num_prompt_tokens, num_blocks)
