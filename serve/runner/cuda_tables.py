"""What a device keeps of every running sequence, by slot, so that a step brings only changes.

The host's copy is `SequenceTable`. The one decision behind it: the row behind the last slot is
nobody's; padded rows of a captured graph are its, and its one block is the cache's scratch block.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from serve.messages import StepInput

from .cuda_transfer import upload
from .sampling_table import SamplingTable, TokenIds

_MAX_COUNT = 2**15 - 1


class DeviceTables:
    """Block tables, last tokens and token counts by slot.

    Args:
        max_slots: sequences that may run at once.
        max_blocks: blocks of the longest sequence.
        scratch_block: block that padded rows write to.
        vocab_size: ids that are counted; 0 where this rank does not sample.
        device: where the tables lie.
    """

    def __init__(
        self,
        *,
        max_slots: int,
        max_blocks: int,
        scratch_block: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.scratch_slot = max_slots
        num_rows = max_slots + 1
        self.block_tables = torch.zeros(num_rows, max_blocks, dtype=torch.int32, device=device)
        self.block_tables[max_slots] = scratch_block
        self.last_token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.counts = torch.zeros(num_rows, vocab_size, dtype=torch.int16, device=device)
        self.is_in_prompt = torch.zeros(num_rows, vocab_size, dtype=torch.bool, device=device)
        self._is_counted = torch.zeros(num_rows, dtype=torch.int16, device=device)
        self._num_blocks = np.zeros(max_slots, np.int64)
        self._device = device

    def advance(self, step: StepInput, sampling: SamplingTable) -> None:
        """Take over a step's changes; `sampling` knows its new sequences already."""
        places: list[np.ndarray] = []
        blocks: list[int] = []
        changes = [(new.slot, new.block_ids) for new in step.new]
        for new in step.new:
            self._num_blocks[new.slot] = 0
        changes += [(more.slot, more.block_ids) for more in step.more_blocks]
        for slot, block_ids in changes:
            start = slot * self.block_tables.shape[1] + self._num_blocks[slot]
            places.append(np.arange(start, start + len(block_ids)))
            blocks += block_ids
            self._num_blocks[slot] += len(block_ids)
        if blocks:
            where = upload(np.concatenate(places), self._device)
            what = upload(np.array(blocks, np.int32), self._device)
            self.block_tables.view(-1).index_copy_(0, where, what)
        if step.new and self.counts.shape[1]:
            self._meet([new.slot for new in step.new], sampling)

    def count(self, slots: Tensor, token_ids: Tensor) -> None:
        """One more token of the output for each of `slots`; the scratch slot may come often."""
        if not self.counts.shape[1]:
            return
        places = slots.long() * self.counts.shape[1] + token_ids
        counts = self.counts.view(-1)
        before = counts[places]
        counts[places] = before + self._is_counted[slots.long()] * (before < _MAX_COUNT)

    def _meet(self, slots: list[int], sampling: SamplingTable) -> None:
        """Count the tokens of new sequences that have penalties."""
        has_penalties = sampling.has_penalties[slots]
        where = upload(np.array(slots), self._device)
        self._is_counted.index_copy_(0, where, upload(has_penalties.astype(np.int16), self._device))
        for slot in np.array(slots)[has_penalties].tolist():
            ids = sampling.ids[slot]
            assert ids is not None
            self._count_all(slot, ids)

    def _count_all(self, slot: int, ids: TokenIds) -> None:
        self.is_in_prompt[slot].zero_()
        self.counts[slot].zero_()
        if len(ids.prompt_ids):
            prompt_ids = upload(ids.prompt_ids.astype(np.int64), self._device)
            self.is_in_prompt[slot].index_fill_(0, prompt_ids, True)
        if ids.num_output_ids:
            num_ids = ids.num_output_ids
            output_ids = upload(ids.output_ids[:num_ids].astype(np.int64), self._device)
            counts = upload(
                ids.output_counts[:num_ids].clip(max=_MAX_COUNT).astype(np.int16), self._device
            )
            self.counts[slot].index_copy_(0, output_ids, counts)
