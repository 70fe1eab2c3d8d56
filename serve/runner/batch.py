"""A rank's copy of every sequence, by slot, and the rows of a step built from it.

Not a scheduler: it does what `StepInput` says. The one decision behind it: what ranks were told
lies in arrays indexed by slot, so that a decode step costs a few numpy calls, however many
sequences decode, and no Python object a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from serve.kernels.native_attention import SPAN_DTYPE
from serve.messages import Chunk, NewSequence, StepInput

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's rows: one for each decode, then those of the chunks.

    `spans` and `span_slots` have one entry a sequence, decodes first. `sampled_rows` are the last
    rows of the sequences that sample, `sampled_slots` whose they are, in the order of the step's
    output. `block_tables` is the table of all slots, live until the next step begins. With
    `has_own_tokens` the decodes' tokens are what this runner sampled for their slots in the step
    before; a runner that samples on its device finds void ids in their place.
    """

    num_decodes: int
    token_ids: Int64s  # [num_rows]
    positions: Int64s  # [num_rows]
    spans: np.ndarray  # SPAN_DTYPE [num_spans]
    span_slots: Int32s  # [num_spans]
    sampled_rows: Int64s  # [num_sampled]
    sampled_slots: Int32s  # [num_sampled]
    block_tables: Int32s  # [max_slots, max_blocks]
    has_own_tokens: bool

    @property
    def num_rows(self) -> int:
        """Rows of the step."""
        return len(self.token_ids)


class SequenceTable:
    """Tokens and block tables of the running sequences.

    Memory is taken for the most that every slot may hold, and touched only where a sequence is.

    Args:
        max_slots: sequences that may run at once.
        max_tokens: tokens that a sequence may reach.
        block_size: KV slots of a block.
        block_stride: what block ids are multiplied by in `block_tables`: how many of its own units
            the KV pool counts from one block to the next.
    """

    def __init__(
        self, *, max_slots: int, max_tokens: int, block_size: int, block_stride: int = 1
    ) -> None:
        max_blocks = -(-max_tokens // block_size)
        self._block_size = block_size
        self._block_stride = block_stride
        self._num_blocks = np.zeros(max_slots, np.int64)
        self.block_tables = np.zeros((max_slots, max_blocks), np.int32)
        rows = np.arange(max_slots, dtype=np.uint64) * np.uint64(self.block_tables.strides[0])
        self._addresses = rows + np.uint64(self.block_tables.ctypes.data)
        self.token_ids = np.zeros((max_slots, max_tokens), np.int32)
        self.num_tokens = np.zeros(max_slots, np.int64)
        self.num_prompt_tokens = np.zeros(max_slots, np.int64)
        self.last_token_ids = np.zeros(max_slots, np.int32)
        """By slot, what this runner sampled last; whoever samples writes it."""

    def advance(self, step: StepInput) -> Batch | None:
        """Take over a step's changes and build its batch; None where nothing runs."""
        for slot in step.released:
            self.num_tokens[slot] = self._num_blocks[slot] = 0
        for new in step.new:
            self._meet(new)
        for more in step.more_blocks:
            self._extend(more.slot, more.block_ids)
        decodes = np.frombuffer(step.decodes, np.int32)
        has_own_tokens = len(decodes) > 0 and not step.decode_token_ids
        new_ids = (
            self.last_token_ids[decodes]
            if has_own_tokens
            else np.frombuffer(step.decode_token_ids, np.int32)
        )
        starts = self.num_tokens[decodes]
        self.token_ids[decodes, starts] = new_ids
        self.num_tokens[decodes] = starts + 1
        if not len(decodes) and not step.chunks:
            return None
        return self._batch(decodes, starts, step.chunks, has_own_tokens=has_own_tokens)

    def _meet(self, new: NewSequence) -> None:
        assert self.num_tokens[new.slot] == 0, "the slot is taken"
        self.num_tokens[new.slot] = len(new.token_ids)
        self.num_prompt_tokens[new.slot] = new.num_prompt_tokens
        self.token_ids[new.slot, : len(new.token_ids)] = new.token_ids
        self._num_blocks[new.slot] = 0
        self._extend(new.slot, new.block_ids)

    def _extend(self, slot: int, block_ids: list[int]) -> None:
        start = self._num_blocks[slot]
        units = np.array(block_ids, np.int32) * self._block_stride
        self.block_tables[slot, start : start + len(block_ids)] = units
        self._num_blocks[slot] = start + len(block_ids)

    def _batch(
        self, decodes: Int32s, starts: Int64s, chunks: list[Chunk], *, has_own_tokens: bool
    ) -> Batch:
        slots, is_sampled = decodes, np.ones(len(decodes), np.bool_)
        counts = np.ones(len(decodes), np.int64)
        token_ids = [self.token_ids[decodes, starts]]
        if chunks:
            parts = np.array([_numbers(chunk) for chunk in chunks], np.int64)
            slots = np.concatenate((decodes, parts[:, 0]), dtype=np.int32)
            starts = np.concatenate((starts, parts[:, 1]))
            counts = np.concatenate((counts, parts[:, 2]))
            is_sampled = np.concatenate((is_sampled, parts[:, 3] > 0))
            token_ids += [self.token_ids[slot, start : start + n] for slot, start, n, _ in parts]
        ends = counts.cumsum()
        first_rows = ends - counts
        assert (starts + counts <= self.num_tokens[slots]).all()
        assert (starts + counts <= self._num_blocks[slots] * self._block_size).all()
        spans = np.empty(len(slots), SPAN_DTYPE)
        spans["first_row"], spans["num_tokens"] = first_rows, counts
        spans["first_position"] = starts
        spans["block_table"] = self._addresses[slots]
        return Batch(
            num_decodes=len(decodes),
            token_ids=np.concatenate(token_ids, dtype=np.int64),
            positions=np.arange(ends[-1]) + np.repeat(starts - first_rows, counts),
            spans=spans,
            span_slots=slots,
            sampled_rows=ends[is_sampled] - 1,
            sampled_slots=slots[is_sampled],
            block_tables=self.block_tables,
            has_own_tokens=has_own_tokens,
        )


def _numbers(chunk: Chunk) -> tuple[int, int, int, bool]:
    return chunk.slot, chunk.num_computed_tokens, chunk.num_scheduled_tokens, chunk.is_sampled
