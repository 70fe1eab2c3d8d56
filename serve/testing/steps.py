"""Writes steps by hand, as the engine does, and keeps what a runner answered.

What tests and benchmarks of a runner need when they want to say themselves what runs in which step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from serve.messages import (
    Chunk,
    MoreBlocks,
    NewSequence,
    SamplingParams,
    StepInput,
    StepOutput,
    TopLogprobs,
)


class _Pending(Protocol):
    def result(self) -> StepOutput: ...


class StepRunner(Protocol):
    """A runner of any kind."""

    def start(self, step: StepInput) -> None: ...

    def sample(self, masks: Mapping[int, np.ndarray]) -> _Pending: ...


@dataclass(slots=True)
class Answer:
    """What one slot's sequence sampled."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TopLogprobs | None] = field(default_factory=list)


@dataclass
class StepWriter:
    """Drives `runner`; the caller says which sequences go on, and how far.

    Blocks are handed out in order and never twice, so a released sequence's are not seen again.
    Tokens go back to the runner, or stay its own where `tells_tokens` is false.
    """

    runner: StepRunner
    block_size: int
    tells_tokens: bool = True
    answers: dict[int, Answer] = field(default_factory=dict)
    num_steps: int = 0
    num_blocks: int = 0
    _lengths: dict[int, int] = field(default_factory=dict)
    _held_blocks: dict[int, int] = field(default_factory=dict)
    _released: list[int] = field(default_factory=list)
    _new: list[NewSequence] = field(default_factory=list)

    def add(
        self,
        slot: int,
        prompt: list[int],
        params: SamplingParams,
        *,
        output: Iterable[int] = (),
        shared_blocks: Iterable[int] = (),
    ) -> None:
        """A sequence for `slot`, known from the next step on; `shared_blocks` are computed."""
        token_ids, blocks = [*prompt, *output], list(shared_blocks)
        self._new.append(NewSequence(slot, token_ids, len(prompt), params, blocks))
        self._lengths[slot], self._held_blocks[slot] = len(token_ids), len(blocks)
        self.answers.setdefault(slot, Answer())

    def release(self, slot: int) -> None:
        """The sequence in `slot` is forgotten with the next step."""
        self._released.append(slot)
        del self._lengths[slot], self._held_blocks[slot]

    def step(
        self,
        decodes: Iterable[int] = (),
        chunks: Iterable[tuple[int, int, int]] = (),
        masks: Mapping[int, np.ndarray] | None = None,
    ) -> StepOutput:
        """Slots that go on by the token they sampled last; (slot, first position, end) of chunks.

        A chunk that ends with the last known token samples.
        """
        going = list(decodes)
        ids = [self.answers[slot].token_ids[-1] for slot in going] if self.tells_tokens else []
        for slot in going:
            self._lengths[slot] += 1
        parts = [
            Chunk(slot, start, end - start, end == self._lengths[slot])
            for slot, start, end in chunks
        ]
        ends = [(slot, self._lengths[slot]) for slot in going]
        ends += [(p.slot, p.num_computed_tokens + p.num_scheduled_tokens) for p in parts]
        self.num_steps += 1
        step = StepInput(
            self.num_steps,
            self._released,
            self._new,
            [more for slot, end in ends for more in self._more_blocks(slot, end)],
            np.array(going, np.int32).tobytes(),
            np.array(ids, np.int32).tobytes(),
            parts,
            bool(masks),
        )
        self._released, self._new = [], []
        self.runner.start(step)
        output = self.runner.sample(masks or {}).result()
        sampled = [*going, *(part.slot for part in parts if part.is_sampled)]
        for row, (slot, token_id) in enumerate(zip(sampled, output.token_ids, strict=False)):
            self.answers[slot].token_ids.append(token_id)
            self.answers[slot].logprobs.append(output.logprobs.get(row))
        return output

    def _more_blocks(self, slot: int, end: int) -> list[MoreBlocks]:
        num_missing = -(-end // self.block_size) - self._held_blocks[slot]
        if num_missing <= 0:
            return []
        blocks = list(range(self.num_blocks, self.num_blocks + num_missing))
        self.num_blocks += num_missing
        self._held_blocks[slot] += num_missing
        return [MoreBlocks(slot, blocks)]


def answer(
    runner: StepRunner,
    prompt: list[int],
    params: SamplingParams,
    *,
    num_tokens: int,
    block_size: int,
    tells_tokens: bool = True,
) -> Answer:
    """What one sequence alone in slot 0 samples, its prompt in one chunk."""
    writer = StepWriter(runner, block_size, tells_tokens)
    writer.add(0, prompt, params)
    writer.step(chunks=[(0, 0, len(prompt))])
    for _ in range(num_tokens - 1):
        writer.step([0])
    writer.release(0)
    writer.step()
    return writer.answers[0]
