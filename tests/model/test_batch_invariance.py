"""Logits have the same bits whatever the batch, the chunks and the threads, in both dtypes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serve.attention.paged import PagedAttention
from serve.attention.protocol import Span
from serve.checkpoint import inspect_checkpoint
from serve.model.qwen2 import Qwen2Model
from serve.model.tensor_parallel import SingleRank
from serve.model.weights import load
from serve.runner.kv_pool import KVPool

BLOCK_SIZE = 16
NUM_BLOCKS = 12
MAX_TOKENS = 150


class _Sequences:
    """A model and its KV pool, stepped by hand; sequence i owns NUM_BLOCKS blocks from 12 * i."""

    def __init__(self, path: Path, dtype: torch.dtype, *, num_sequences: int) -> None:
        checkpoint = inspect_checkpoint(path)
        self._model = Qwen2Model(
            checkpoint.shape, SingleRank(), dtype=dtype, num_positions=MAX_TOKENS
        )
        load(checkpoint, self._model.cuts())
        self._pool = KVPool(
            checkpoint.shape,
            size=1,
            num_blocks=NUM_BLOCKS * num_sequences,
            block_size=BLOCK_SIZE,
            dtype=dtype,
        )
        self._heads = checkpoint.shape.num_heads

    def step(self, parts: list[tuple[int, int, list[int]]]) -> list[Tensor]:
        """Logits of (sequence, first position, token ids) each, in one batch."""
        attention = PagedAttention(
            self._pool.keys, self._pool.values, block_size=BLOCK_SIZE, num_heads=self._heads
        )
        spans, first_row = [], 0
        for sequence, start, ids in parts:
            table = np.arange(NUM_BLOCKS) + sequence * NUM_BLOCKS
            spans.append(Span(first_row, len(ids), start, table))
            first_row += len(ids)
        token_ids = torch.tensor([token_id for _, _, ids in parts for token_id in ids])
        positions = torch.cat([torch.arange(start, start + len(ids)) for _, start, ids in parts])
        with torch.inference_mode():
            hidden = self._model.forward(token_ids, positions, attention.plan(spans))
            logits = self._model.logits(hidden)
        assert logits is not None
        return list(logits.split([len(ids) for _, _, ids in parts]))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(((14, 2), torch.float32), id="14/2-float32"),
        pytest.param(((14, 2), torch.bfloat16), id="14/2-bfloat16"),
        pytest.param(((3, 1), torch.float32), id="3/1-float32"),
    ],
)
def sequences(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> _Sequences:
    (num_heads, num_kv_heads), dtype = request.param
    path = checkpoint(num_heads=num_heads, num_kv_heads=num_kv_heads, dtype=dtype)
    return _Sequences(path, dtype, num_sequences=8)


@settings(max_examples=12, deadline=None)
@given(
    num_tokens=st.integers(2, MAX_TOKENS),
    cuts=st.sets(st.integers(1, MAX_TOKENS), max_size=4),
    neighbours=st.lists(st.integers(1, 60), max_size=7),
    num_threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_bits_do_not_depend_on_chunks_batch_or_threads(
    sequences, num_tokens, cuts, neighbours, num_threads, seed
):
    random, before = np.random.default_rng(seed), torch.get_num_threads()
    ids = random.integers(0, 131, num_tokens).tolist()
    torch.set_num_threads(1)
    alone = sequences.step([(0, 0, ids)])[0]
    torch.set_num_threads(num_threads)
    try:
        others = [
            (number, 0, random.integers(0, 131, count).tolist())
            for number, count in enumerate(neighbours, start=1)
        ]
        bounds = [0, *sorted(cut for cut in cuts if cut < num_tokens), num_tokens]
        for start, end in itertools.pairwise(bounds):
            place = int(random.integers(0, len(others) + 1))
            parts = [*others[:place], (0, start, ids[start:end]), *others[place:]]
            assert torch.equal(sequences.step(parts)[place], alone[start:end])
    finally:
        torch.set_num_threads(before)


def test_decode_gives_the_bits_of_prefill(sequences):
    ids = list(range(40))
    whole = sequences.step([(0, 0, ids)])[0]
    first = sequences.step([(0, 0, ids[:10])])[0]
    steps = [sequences.step([(0, position, [ids[position]])])[0] for position in range(10, 40)]
    assert torch.equal(torch.cat([first, *steps]), whole)


def test_a_batch_of_sequences_decodes_with_the_bits_of_one(sequences):
    prompts = [list(range(7 + 3 * i)) for i in range(8)]
    alone = [sequences.step([(0, 0, prompt), (1, 0, [1])])[0][-1] for prompt in prompts]
    for number, prompt in enumerate(prompts):
        sequences.step([(number, 0, prompt[:-1])])
    together = sequences.step(
        [(number, len(prompt) - 1, prompt[-1:]) for number, prompt in enumerate(prompts)]
    )
    assert all(torch.equal(row[0], one) for row, one in zip(together, alone, strict=True))
