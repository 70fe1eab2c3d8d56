"""A step's rows are what a walk over its sequences, token by token, would list."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.messages import Chunk, MoreBlocks, NewSequence, SamplingParams, StepInput
from serve.runner.batch import Batch, SequenceTable

BLOCK_SIZE = 4
MAX_SLOTS = 6
PARAMS = SamplingParams(seed=0, max_tokens=9)


@dataclass
class _Sequence:
    token_ids: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)


@dataclass
class _Expected:
    rows: list[tuple[int, int]] = field(default_factory=list)  # token, position
    spans: list[tuple[int, int, int, int, list[int]]] = field(default_factory=list)
    sampled: list[tuple[int, int]] = field(default_factory=list)  # row, slot

    def add(self, slot: int, sequence: _Sequence, start: int, end: int) -> None:
        self.spans.append((slot, len(self.rows), end - start, start, sequence.blocks))
        self.rows += [(sequence.token_ids[p], p) for p in range(start, end)]
        if end == len(sequence.token_ids):
            self.sampled.append((len(self.rows) - 1, slot))
        sequence.num_computed = end


class _Walk:
    """Sequences as lists; writes random steps and says what their batch must be."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data
        self._sequences: dict[int, _Sequence] = {}
        self._num_blocks = 0

    def step(self) -> tuple[StepInput, _Expected]:
        draw = self._data.draw
        released = draw(st.lists(st.sampled_from(sorted(self._sequences)), unique=True)
                        if self._sequences and draw(st.booleans()) else st.just([]))  # fmt: skip
        for slot in released:
            del self._sequences[slot]
        new = []
        for slot in set(range(MAX_SLOTS)) - set(self._sequences):
            if draw(st.booleans()):
                token_ids = draw(st.lists(st.integers(0, 999), min_size=1, max_size=20))
                self._sequences[slot] = _Sequence(token_ids)
                new.append(NewSequence(slot, token_ids, 1, PARAMS, []))
        decodes = [s for s, known in self._sequences.items() if self._is_done(known)]
        tokens = [draw(st.integers(0, 999)) for _ in decodes]
        more: list[MoreBlocks] = []
        expected = _Expected()
        for slot, token_id in zip(decodes, tokens, strict=True):
            known = self._sequences[slot]
            known.token_ids.append(token_id)
            more += self._grow(slot, len(known.token_ids))
            expected.add(slot, known, known.num_computed, len(known.token_ids))
        chunks = []
        for slot in sorted(set(self._sequences) - set(decodes)):
            known = self._sequences[slot]
            start, length = known.num_computed, len(known.token_ids)
            end = draw(st.integers(start + 1, length))
            more += self._grow(slot, end)
            chunks.append(Chunk(slot, start, end - start, end == length))
            expected.add(slot, known, start, end)
        decoded = (np.array(values, np.int32).tobytes() for values in (decodes, tokens))
        return StepInput(0, released, new, more, *decoded, chunks), expected

    def _is_done(self, known: _Sequence) -> bool:
        return known.num_computed == len(known.token_ids) < 40

    def _grow(self, slot: int, end: int) -> list[MoreBlocks]:
        known = self._sequences[slot]
        missing = -(-end // BLOCK_SIZE) - len(known.blocks)
        blocks = list(range(self._num_blocks, self._num_blocks + missing))
        self._num_blocks += missing
        known.blocks += blocks
        return [MoreBlocks(slot, blocks)] if blocks else []


def _listed(batch: Batch, block_stride: int) -> _Expected:
    found = _Expected()
    found.rows = list(zip(batch.token_ids.tolist(), batch.positions.tolist(), strict=True))
    for span, slot in zip(batch.spans, batch.span_slots.tolist(), strict=True):
        first_row, num_tokens, first_position, address = span.tolist()
        table = batch.block_tables[slot]
        assert address == table.ctypes.data
        num_blocks = -(-(first_position + num_tokens) // BLOCK_SIZE)
        blocks = (table[:num_blocks] // block_stride).tolist()
        found.spans.append((slot, first_row, num_tokens, first_position, blocks))
    sampled = zip(batch.sampled_rows.tolist(), batch.sampled_slots.tolist(), strict=True)
    found.sampled = list(sampled)
    return found


@settings(max_examples=60, deadline=None)
@given(data=st.data(), block_stride=st.sampled_from([1, 5]))
def test_batch_is_the_walk_over_its_sequences(data: st.DataObject, block_stride: int) -> None:
    walk = _Walk(data)
    table = SequenceTable(
        max_slots=MAX_SLOTS, max_tokens=60, block_size=BLOCK_SIZE, block_stride=block_stride
    )
    for _ in range(data.draw(st.integers(1, 12))):
        step, expected = walk.step()
        batch = table.advance(step)
        found = _Expected() if batch is None else _listed(batch, block_stride)
        assert found == expected
