"""A step being put together: what the runner gets, and whose tokens come back.

Not the choice of who takes part: see `scheduler`. Its rows are those of `StepOutput`: one for each
decode, then one for each chunk that samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from serve.messages import Chunk, MoreBlocks, NewSequence

from .sequence import Sequence


@dataclass(slots=True)
class Schedule:
    """One step.

    `decodes` is never changed in place: steps in flight share it while nobody joins or leaves.
    `computed` are the sequences of the chunks, each with its computed tokens after this step;
    `sampled` those of them that sample.
    """

    decodes: list[Sequence] = field(default_factory=list)
    computed: list[tuple[Sequence, int]] = field(default_factory=list)
    sampled: list[Sequence] = field(default_factory=list)
    new: list[NewSequence] = field(default_factory=list)
    more_blocks: list[MoreBlocks] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    num_tokens: int = 0
    wants_masks: bool = False

    @property
    def rows(self) -> list[Sequence]:
        return [*self.decodes, *self.sampled] if self.sampled else self.decodes

    def add_chunk(self, sequence: Sequence, num_tokens: int) -> None:
        """Compute the next `num_tokens` known tokens of `sequence`."""
        start = sequence.num_computed_tokens
        end = start + num_tokens
        is_sampled = end == sequence.num_prefill_tokens
        self.chunks.append(Chunk(sequence.slot, start, num_tokens, is_sampled))
        self.computed.append((sequence, end))
        if is_sampled:
            self.sampled.append(sequence)
        sequence.num_computed_tokens = end
        self.num_tokens += num_tokens
