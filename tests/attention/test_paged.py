"""Paged attention equals torch's dense one, and a query's bits know nothing of the batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serve.attention.paged import PagedAttention
from serve.attention.protocol import AttentionBackend, Span, StepAttention
from serve.kernels.attention import KV_TILE_TOKENS

HEADS = [(2, 1, 16), (7, 1, 16), (14, 2, 64), (4, 4, 32), (3, 1, 128), (20, 1, 16)]


class DenseAttention:
    """The slow twin: keeps every sequence's keys and values whole and calls torch's SDPA.

    Sequences are told apart by their first block.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], list[Tensor]] = {}

    def plan(self, spans: Sequence[Span]) -> _DenseStep:
        return _DenseStep(self._known, list(spans))


@dataclass
class _DenseStep:
    known: dict[tuple[int, int], list[Tensor]]
    spans: list[Span]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty(query.shape[0], query.shape[1] * query.shape[2])
        for span in self.spans:
            rows = slice(span.first_row, span.first_row + span.num_tokens)
            kept = self.known.setdefault((layer, int(span.block_table[0])), [])
            del kept[span.first_position :]
            kept.extend(torch.stack((key[rows], value[rows]), dim=1).unbind())
            keys, values = torch.stack(kept).permute(1, 2, 0, 3)
            end = span.first_position + span.num_tokens
            mask = torch.arange(end) <= torch.arange(span.first_position, end)[:, None]
            found = torch.nn.functional.scaled_dot_product_attention(
                query[rows].transpose(0, 1)[None],
                keys[None],
                values[None],
                attn_mask=mask,
                enable_gqa=True,
            )
            out[rows] = found[0].transpose(0, 1).flatten(1)
        return out


def _paged(heads: tuple[int, int, int], *, num_blocks: int, block_size: int) -> PagedAttention:
    num_heads, num_kv_heads, head_dim = heads
    caches = []
    for _ in range(2):
        # what nobody wrote is poison: reading it shows
        cache = torch.full((num_kv_heads, num_blocks * block_size + 1, head_dim), torch.nan)
        cache[:, -1] = 0
        caches.append([cache])
    return PagedAttention(*caches, block_size=block_size, num_heads=num_heads)


def _tokens(heads: tuple[int, int, int], num_tokens: int, seed: int) -> list[Tensor]:
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(num_tokens, count, head_dim, generator=generator)
        for count in (num_heads, num_kv_heads, num_kv_heads)
    ]


def _run(
    backend: AttentionBackend, tokens: list[list[Tensor]], tables: list[np.ndarray], ends: list[int]
) -> list[Tensor]:
    """One step that takes each sequence i from 0 (or where it stands) to `ends[i]`."""
    spans, first_row = [], 0
    for table, end in zip(tables, ends, strict=True):
        spans.append(Span(first_row, end, 0, table))
        first_row += end
    joined = [
        torch.cat([parts[i][:end] for parts, end in zip(tokens, ends, strict=True)])
        for i in range(3)
    ]
    step: StepAttention = backend.plan(spans)
    return list(step.attend(0, *joined).split(ends))


@settings(max_examples=40, deadline=None)
@given(
    heads=st.sampled_from(HEADS),
    block_size=st.sampled_from([1, 3, 16]),
    steps=st.lists(
        st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=4
    ).filter(lambda steps: all(any(step) for step in steps)),
    seed=st.integers(0, 2**31),
)
def test_paged_equals_dense_over_any_schedule(heads, block_size, steps, seed):
    lengths = np.sum(steps, axis=0)
    num_blocks = [max(1, -(-int(length) // block_size)) for length in lengths]
    order = np.random.default_rng(seed).permutation(sum(num_blocks)).astype(np.int64)
    tables = np.split(order, np.cumsum(num_blocks)[:-1])
    tokens = [_tokens(heads, int(length), seed + i) for i, length in enumerate(lengths)]
    paged, dense = (
        _paged(heads, num_blocks=sum(num_blocks), block_size=block_size),
        DenseAttention(),
    )
    starts = [0, 0, 0]
    for step in steps:
        spans, rows, first_row = [], [], 0
        for i, num_tokens in enumerate(step):
            if num_tokens:
                spans.append(Span(first_row, num_tokens, starts[i], tables[i]))
                rows.append([part[starts[i] : starts[i] + num_tokens] for part in tokens[i]])
                first_row += num_tokens
                starts[i] += num_tokens
        query, key, value = (torch.cat(parts) for parts in zip(*rows, strict=True))
        expected = dense.plan(spans).attend(0, query, key, value)
        found = paged.plan(spans).attend(0, query, key, value)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    heads=st.sampled_from(HEADS),
    length=st.integers(1, 3 * KV_TILE_TOKENS),
    cuts=st.sets(st.integers(1, 3 * KV_TILE_TOKENS), max_size=4),
    num_neighbours=st.integers(0, 5),
    num_threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**31),
)
def test_a_query_s_bits_do_not_depend_on_chunks_neighbours_or_threads(
    heads, length, cuts, num_neighbours, num_threads, seed
):
    block_size, before = 16, torch.get_num_threads()
    num_blocks = -(-length // block_size)
    table = np.arange(num_blocks)
    query, key, value = _tokens(heads, length, seed)
    whole = _run(
        _paged(heads, num_blocks=num_blocks, block_size=block_size),
        [[query, key, value]], [table], [length],
    )[0]  # fmt: skip
    backend = _paged(heads, num_blocks=num_blocks + 40, block_size=block_size)
    bounds = [0, *sorted(cut for cut in cuts if cut < length), length]
    torch.set_num_threads(num_threads)
    try:
        for start, end in itertools.pairwise(bounds):
            spans, parts = [], [[part[start:end]] for part in (query, key, value)]
            spans.append(Span(0, end - start, start, table))
            first_row = end - start
            for neighbour in range(num_neighbours):
                num_tokens = 1 + (seed + neighbour * 37) % 100
                own = num_blocks + np.arange(8) + 8 * neighbour
                spans.append(Span(first_row, num_tokens, 0, own))
                for kept, new in zip(parts, _tokens(heads, num_tokens, neighbour), strict=True):
                    kept.append(new)
                first_row += num_tokens
            step = backend.plan(spans)
            found = step.attend(0, *(torch.cat(part) for part in parts))
            assert torch.equal(found[: end - start], whole[start:end])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("heads", HEADS)
def test_token_by_token_gives_the_bits_of_one_chunk(heads):
    length = KV_TILE_TOKENS + 9
    tokens = _tokens(heads, length, 1)
    table = np.arange(-(-length // 16))
    whole = _run(_paged(heads, num_blocks=9, block_size=16), [tokens], [table], [length])[0]
    backend = _paged(heads, num_blocks=9, block_size=16)
    for position in range(length):
        row = [part[position : position + 1] for part in tokens]
        found = backend.plan([Span(0, 1, position, table)]).attend(0, *row)
        assert torch.equal(found[0], whole[position])


def test_parts_within_a_small_bound_give_the_same_bits(monkeypatch):
    heads = (14, 2, 64)
    lengths = [150, 1, 40, 5, 260]
    tokens = [_tokens(heads, length, i) for i, length in enumerate(lengths)]
    tables = np.split(np.arange(40), np.cumsum([-(-n // 16) for n in lengths]))[:5]

    def outputs() -> list[Tensor]:
        return _run(_paged(heads, num_blocks=40, block_size=16), tokens, list(tables), lengths)

    at_once = outputs()
    monkeypatch.setattr("serve.attention.tiles._MAX_VALUES", 1)
    assert all(torch.equal(a, b) for a, b in zip(at_once, outputs(), strict=True))


def test_a_poisoned_sequence_leaves_its_neighbours_and_the_next_owner_of_its_blocks_alone():
    heads = (4, 2, 32)
    tokens = [_tokens(heads, 20, i) for i in range(3)]
    clean = _run(_paged(heads, num_blocks=6, block_size=16), tokens[1:2], [np.array([2, 3])], [20])[
        0
    ]
    backend = _paged(heads, num_blocks=6, block_size=16)
    poison = [torch.full_like(part, torch.nan) for part in tokens[0]]
    mixed = _run(backend, [poison, tokens[1]], [np.array([0, 1]), np.array([2, 3])], [20, 20])
    assert torch.equal(mixed[1], clean)
    reused = _run(backend, [tokens[1]], [np.array([0, 1])], [20])[0]
    assert torch.equal(reused, clean)
