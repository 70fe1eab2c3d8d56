"""A rank's copy of every sequence, and the tensors of a step built from it.

Not a scheduler: it does what `StepInput` says. The one decision behind it: ranks keep what they
were told and steps carry only what changed, so a decode step's message has one token a sequence.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from serve.attention.protocol import Span
from serve.messages import NewSequence, ScheduledSequence, StepInput

from .sampler import SamplingRow


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's rows. `sampled_rows` are the last rows of the sequences that sample."""

    token_ids: Tensor  # int64 [num_tokens]
    positions: Tensor  # int64 [num_tokens]
    spans: list[Span]
    sampled_rows: Tensor  # int64 [num_sampled]
    sampling: list[SamplingRow]


@dataclass(slots=True)
class _Sequence:
    row: SamplingRow
    token_ids: array[int]
    block_ids: array[int] = field(default_factory=lambda: array("q"))


class SequenceTable:
    """Tokens and block tables of every sequence that was scheduled and not yet released."""

    def __init__(self, *, block_size: int) -> None:
        self._block_size = block_size
        self._sequences: dict[int, _Sequence] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def advance(self, step: StepInput) -> Batch | None:
        """Take over a step's changes and build its batch; None where nothing is scheduled."""
        for seq_id in step.released:
            del self._sequences[seq_id]
        for new in step.new:
            self._sequences[new.seq_id] = _meet(new)
        if not step.scheduled:
            return None
        token_ids, positions = array("q"), []
        spans: list[Span] = []
        sampled_rows: list[int] = []
        sampling: list[SamplingRow] = []
        for scheduled in step.scheduled:
            sequence = self._update(scheduled)
            start, num_tokens = scheduled.num_computed_tokens, scheduled.num_scheduled_tokens
            assert start + num_tokens <= len(sequence.token_ids)
            assert start + num_tokens <= len(sequence.block_ids) * self._block_size
            spans.append(Span(len(token_ids), num_tokens, start, np.array(sequence.block_ids)))
            token_ids.extend(sequence.token_ids[start : start + num_tokens])
            positions.append(np.arange(start, start + num_tokens))
            if scheduled.is_sampled:
                sampled_rows.append(len(token_ids) - 1)
                sampling.append(sequence.row)
        return Batch(
            token_ids=torch.tensor(token_ids),
            positions=torch.from_numpy(np.concatenate(positions)),
            spans=spans,
            sampled_rows=torch.tensor(sampled_rows, dtype=torch.int64),
            sampling=sampling,
        )

    def _update(self, scheduled: ScheduledSequence) -> _Sequence:
        sequence = self._sequences[scheduled.seq_id]
        sequence.token_ids.extend(scheduled.new_token_ids)
        sequence.row.output_token_ids.extend(scheduled.new_token_ids)
        sequence.block_ids.extend(scheduled.new_block_ids)
        return sequence


def _meet(new: NewSequence) -> _Sequence:
    prompt, output = new.token_ids[: new.num_prompt_tokens], new.token_ids[new.num_prompt_tokens :]
    row = SamplingRow(new.seq_id, new.sampling, prompt, output)
    return _Sequence(row, array("q", new.token_ids))
