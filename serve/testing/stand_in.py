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

from serve.messages import NewSequence, SampledToken, StepInput, StepOutput
from serve.seeds import uniform

# In a byte-level vocabulary these are printable ASCII, with up to 32 special ids before the bytes.
_FIRST_ID = 32
_NUM_IDS = 62


@dataclass(slots=True)
class _KnownSequence:
    key: int
    num_tokens: int
    num_prompt_tokens: int
    num_blocks: int = 0


class StandInRunner:
    """Takes `step_s` a step through `sleep`; owns `num_total_blocks` blocks of no memory.

    Tokens are ids in [32, 94), or [0, `vocab_size`) where that is smaller; the first allowed id
    where a mask forbids the one chosen. It never chooses an end of sequence by itself.
    """

    def __init__(
        self,
        step_s: float,
        num_total_blocks: int,
        vocab_size: int,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.step_s = step_s
        self.num_total_blocks = num_total_blocks
        self.vocab_size = vocab_size
        self._sleep = sleep
        self._known: dict[int, _KnownSequence] = {}
        self._first_id = _FIRST_ID if vocab_size >= _FIRST_ID + _NUM_IDS else 0
        self._num_ids = min(_NUM_IDS, vocab_size)

    def execute(self, step: StepInput, masks: Mapping[int, np.ndarray]) -> StepOutput:
        """Run one step; see `serve.messages.StepInput` for the order on arrival."""
        if self.step_s > 0:
            self._sleep(self.step_s)
        for seq_id in step.released:
            del self._known[seq_id]
        for new in step.new:
            self._known[new.seq_id] = _meet(new)
        tokens = []
        for scheduled in step.scheduled:
            known = self._known[scheduled.seq_id]
            known.num_tokens += len(scheduled.new_token_ids)
            known.num_blocks += len(scheduled.new_block_ids)
            end = scheduled.num_computed_tokens + scheduled.num_scheduled_tokens
            assert known.num_blocks <= self.num_total_blocks
            assert scheduled.is_sampled == (end == known.num_tokens)
            if scheduled.is_sampled:
                token_id = self._choose(known, masks.get(scheduled.seq_id))
                tokens.append(SampledToken(scheduled.seq_id, token_id))
        return StepOutput(step.step_id, tokens)

    def _choose(self, known: _KnownSequence, mask: np.ndarray | None) -> int:
        position = known.num_tokens - known.num_prompt_tokens
        token_id = self._first_id + int(uniform(known.key, position) * self._num_ids)
        if mask is None:
            return token_id
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")
        return token_id if allowed[token_id] else int(allowed.argmax())


def _meet(new: NewSequence) -> _KnownSequence:
    prompt = array("I", new.token_ids[: new.num_prompt_tokens])
    key = zlib.crc32(prompt.tobytes()) ^ new.sampling.seed
    return _KnownSequence(key, len(new.token_ids), new.num_prompt_tokens)
