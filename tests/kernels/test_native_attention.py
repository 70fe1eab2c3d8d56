"""Paged attention in C++ equals its torch twin and an exact softmax; a row knows only its own past.

Keys and values lie in the runner's pool, beside another layer's. It is full of what nobody
may see before anything is written to it: not-a-number, infinity.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.attention.paged import PagedAttention
from serve.attention.protocol import Span
from serve.kernels import abi
from serve.kernels.elementwise import rotate
from serve.kernels.native import NativeLibrary, Pool
from serve.kernels.native_attention import SPAN_DTYPE, attend, attention_heads
from serve.runner.kv_pool import NativeKVPool

HEADS = [(1, 1), (2, 1), (7, 1), (14, 2), (8, 1), (4, 2), (16, 1)]
GARBAGE = [0xFFFFFFFF, 0x7F807F80, 0x7F800000, 0x7F7F7F7F]
NUM_POSITIONS = 4096
NUM_LAYERS, LAYER = 2, 1  # of a pool, and the one that attends
SPLIT_TOKENS = 512  # of attention_plan.h; tests go beyond it

shapes = st.builds(
    lambda heads, head_dim, block_size, dtype: attention_heads(
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
    ),
    st.sampled_from(HEADS),
    st.sampled_from([32, 64, 128]),
    st.sampled_from([16, 32]),
    st.sampled_from([abi.F32, abi.BF16]),
)


@pytest.fixture(scope="module")
def pools(library: NativeLibrary) -> Iterator[dict[int, Pool]]:
    made = {num_threads: library.pool(num_threads) for num_threads in (1, 2, 3)}
    yield made
    for pool in made.values():
        pool.close()


def _heads(num_heads: int, num_kv_heads: int, head_dim: int, *, dtype: int = abi.BF16) -> abi.Heads:
    return attention_heads(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=16,
        dtype=dtype,
    )


@functools.cache
def _angles(head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    frequencies = 1e4 ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.arange(NUM_POSITIONS)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _tokens(heads: abi.Heads, num_tokens: int, seed: int) -> np.ndarray:
    """[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], as a linear layer makes them."""
    width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    return np.random.default_rng(seed).standard_normal((num_tokens, width), np.float32)


def _rotated(heads: abi.Heads, tokens: np.ndarray) -> list[torch.Tensor]:
    """Query, key and value [num_tokens, heads, head_dim] by the torch twin, positions from 0."""
    cos, sin = (torch.from_numpy(table[: len(tokens)]) for table in _angles(heads.head_dim))
    split = torch.from_numpy(tokens.copy()).view(len(tokens), -1, heads.head_dim)
    query, key, value = split.split([heads.num_heads, heads.num_kv_heads, heads.num_kv_heads], 1)
    cos, sin = torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]
    return [rotate(query, cos, sin), rotate(key, cos, sin), value]


def _exact(heads: abi.Heads, tokens: np.ndarray, *, first_row: int = 0) -> np.ndarray:
    """Softmax attention in float64 over keys and values as the cache keeps them."""
    query, key, value = _rotated(heads, tokens)
    if heads.dtype == abi.BF16:
        key, value = key.bfloat16().double(), value.bfloat16().double()
    group_size = heads.num_heads // heads.num_kv_heads
    key, value = (part.double().repeat_interleave(group_size, 1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), key)[:, first_row:]
    hidden = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)[first_row:]
    weights = (scores * heads.head_dim**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1).numpy()


def _tolerance(library: NativeLibrary, heads: abi.Heads) -> float:
    """AVX2 keeps queries and weights in float32; the others round them to bf16 for its products."""
    return 2e-5 if library.isa == "avx2" or heads.dtype == abi.F32 else 3e-2


@dataclass
class Step:
    """One call of the kernel: pieces of sequences, each [start, end) of its tokens."""

    heads: abi.Heads
    kv_pool: NativeKVPool
    pieces: list[tuple[np.ndarray, np.ndarray, int, int]] = field(default_factory=list)

    def add(self, tokens: np.ndarray, table: np.ndarray, start: int, end: int) -> Step:
        self.pieces.append((tokens, table * self.kv_pool.block_stride, start, end))
        return self

    def run(self, pool: Pool) -> list[np.ndarray]:
        spans = np.zeros(len(self.pieces), SPAN_DTYPE)
        first_row = 0
        for i, (_, table, start, end) in enumerate(self.pieces):
            spans[i] = (first_row, end - start, start, table.ctypes.data)
            first_row += end - start
        qkv = np.concatenate([tokens[start:end] for tokens, _, start, end in self.pieces])
        cos, sin = _angles(self.heads.head_dim)
        cache = self.kv_pool.caches[LAYER]
        out = attend(pool, self.heads, cache, spans=spans, qkv=qkv, cos=cos, sin=sin)
        return np.split(out, spans["first_row"][1:])


def _kv_pool(
    pool: Pool, heads: abi.Heads, num_blocks: int, *, garbage: int = GARBAGE[0]
) -> NativeKVPool:
    """Every word of it set, as if other sequences had been there before."""
    kv_pool = NativeKVPool(pool.library, heads, num_layers=NUM_LAYERS, num_blocks=num_blocks)
    _words(kv_pool)[:] = garbage
    return kv_pool


def _words(kv_pool: NativeKVPool) -> np.ndarray:
    """uint32 [num_blocks, block_stride, words of a unit], while the pool lives."""
    memory = kv_pool.memory
    words = (ctypes.c_uint32 * (memory.num_bytes // 4)).from_address(memory.address)
    return np.ctypeslib.as_array(words).reshape(kv_pool.num_blocks, kv_pool.block_stride, -1)


def _num_blocks(heads: abi.Heads, num_tokens: int) -> int:
    return -(-num_tokens // heads.block_size)


def _tables(heads: abi.Heads, lengths: Sequence[int], seed: int) -> tuple[list[np.ndarray], int]:
    """Block tables in random order; behind each one's end stands a block that does not exist."""
    counts = [_num_blocks(heads, length) for length in lengths]
    order = np.random.default_rng(seed).permutation(sum(counts)).astype(np.int32)
    tables = np.split(order, np.cumsum(counts)[:-1])
    return [np.append(table, np.int32(1 << 28)) for table in tables], sum(counts)


def _whole(pool: Pool, heads: abi.Heads, tokens: np.ndarray) -> np.ndarray:
    """All tokens in one chunk of a cache of their own."""
    (table,), num_blocks = _tables(heads, [len(tokens)], 0)
    step = Step(heads, _kv_pool(pool, heads, num_blocks))
    return step.add(tokens, table, 0, len(tokens)).run(pool)[0]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    heads=shapes,
    steps=st.lists(
        st.lists(st.one_of(st.integers(0, 2), st.integers(0, 90)), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    ).filter(lambda steps: all(any(step) for step in steps)),
    num_threads=st.sampled_from([1, 2, 3]),
    garbage=st.sampled_from(GARBAGE),
    seed=st.integers(0, 2**31),
)
def test_any_schedule_equals_an_exact_softmax(pools, heads, steps, num_threads, garbage, seed):
    pool = pools[num_threads]
    lengths = [sum(counts) for counts in zip(*steps, strict=True)]
    tables, num_blocks = _tables(heads, lengths, seed)
    tokens = [_tokens(heads, length, seed + i) for i, length in enumerate(lengths)]
    kv_pool = _kv_pool(pool, heads, num_blocks, garbage=garbage)
    found: list[list[np.ndarray]] = [[] for _ in lengths]
    starts = [0] * len(lengths)
    for counts in steps:
        step, members = Step(heads, kv_pool), [i for i, count in enumerate(counts) if count]
        for i in members:
            step.add(tokens[i], tables[i], starts[i], starts[i] + counts[i])
            starts[i] += counts[i]
        for i, out in zip(members, step.run(pool), strict=True):
            found[i].append(out)
    tolerance = _tolerance(pool.library, heads)
    for outs, one in zip(found, tokens, strict=True):
        if outs:
            np.testing.assert_allclose(np.concatenate(outs), _exact(heads, one), atol=tolerance)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    heads=shapes,
    length=st.integers(1, 200),
    cuts=st.sets(st.integers(1, 200), max_size=4),
    neighbours=st.lists(st.integers(1, 60), max_size=4),
    num_threads=st.sampled_from([1, 2, 3]),
    garbage=st.sampled_from(GARBAGE),
    seed=st.integers(0, 2**31),
)
def test_a_row_s_bits_do_not_depend_on_chunks_neighbours_threads_or_unwritten_slots(
    pools, heads, length, cuts, neighbours, num_threads, garbage, seed
):
    tokens = _tokens(heads, length, seed)
    whole = _whole(pools[1], heads, tokens)
    pool = pools[num_threads]
    (table, *others), num_blocks = _tables(heads, [length, *neighbours], seed)
    kv_pool = _kv_pool(pool, heads, num_blocks, garbage=garbage)
    bounds = [0, *sorted(cut for cut in cuts if cut < length), length]
    for start, end in itertools.pairwise(bounds):
        step = Step(heads, kv_pool)
        for i, (count, other) in enumerate(zip(neighbours, others, strict=True)):
            step.add(_tokens(heads, count, i), other, 0, count)
        found = step.add(tokens, table, start, end).run(pool)[-1]
        assert found.tobytes() == whole[start:end].tobytes()


@pytest.mark.parametrize("dtype", [abi.F32, abi.BF16])
@pytest.mark.parametrize("shape", [(2, 1, 32), (7, 1, 64)])
def test_decodes_one_by_one_have_the_bits_of_one_chunk(pools, shape, dtype):
    heads = _heads(*shape, dtype=dtype)
    tokens = _tokens(heads, 135, 1)
    whole = _whole(pools[2], heads, tokens)
    (table,), num_blocks = _tables(heads, [len(tokens)], 1)
    kv_pool = _kv_pool(pools[1], heads, num_blocks)
    for position in range(len(tokens)):
        step = Step(heads, kv_pool).add(tokens, table, position, position + 1)
        assert step.run(pools[1])[0].tobytes() == whole[position : position + 1].tobytes()


@pytest.mark.parametrize("dtype", [abi.F32, abi.BF16])
def test_rows_on_both_sides_of_a_split_have_the_bits_of_one_chunk(pools, dtype):
    heads = _heads(2, 1, 32, dtype=dtype)
    tokens = _tokens(heads, 2 * SPLIT_TOKENS + 70, 2)
    whole = _whole(pools[3], heads, tokens)
    np.testing.assert_allclose(
        whole, _exact(heads, tokens), atol=_tolerance(pools[1].library, heads)
    )
    (table,), num_blocks = _tables(heads, [len(tokens)], 2)
    kv_pool = _kv_pool(pools[2], heads, num_blocks)
    bounds = [0, 511, 512, 513, 1000, 1023, 1025, 1026, len(tokens)]
    for num_threads, (start, end) in zip(
        itertools.cycle([1, 2, 3]), itertools.pairwise(bounds), strict=False
    ):
        step = Step(heads, kv_pool).add(tokens, table, start, end)
        assert step.run(pools[num_threads])[0].tobytes() == whole[start:end].tobytes()


@pytest.mark.parametrize("dtype", [abi.F32, abi.BF16])
def test_the_last_rows_of_a_long_context_are_right(pools, dtype):
    heads = _heads(1, 1, 32, dtype=dtype)
    length = 7 * SPLIT_TOKENS + 201
    tokens = _tokens(heads, length, 3)
    tokens[1234, -heads.head_dim :] *= 100  # what is seen far back shows
    whole = _whole(pools[2], heads, tokens)
    exact = _exact(heads, tokens, first_row=length - 40)
    np.testing.assert_allclose(whole[-40:], exact, atol=_tolerance(pools[1].library, heads))


def test_more_units_than_scratch_holds_at_once_have_the_bits_of_each_alone(pools):
    if pools[1].library.isa != "avx2":
        pytest.skip("a billion products: only where they are not emulated")
    heads = _heads(32, 1, 128)
    length, num_sequences = SPLIT_TOKENS + 1, 500
    tokens = _tokens(heads, length, 4)
    whole = _whole(pools[1], heads, tokens)
    num_shared = _num_blocks(heads, length) - 1  # all but the block that each decode writes to
    kv_pool = _kv_pool(pools[1], heads, num_shared + num_sequences)
    shared = np.arange(num_shared, dtype=np.int32)
    tables = [np.append(shared, np.int32(num_shared + i)) for i in range(num_sequences)]
    Step(heads, kv_pool).add(tokens, shared, 0, length - 1).run(pools[1])
    step = Step(heads, kv_pool)
    for table in tables:
        step.add(tokens, table, length - 1, length)
    assert {out.tobytes() for out in step.run(pools[2])} == {whole[-1].tobytes()}


@pytest.mark.parametrize("dtype", [abi.F32, abi.BF16])
def test_a_row_does_not_see_what_comes_after_it_however_poisoned(pools, dtype):
    heads = _heads(4, 2, 64, dtype=dtype)
    tokens = _tokens(heads, 75, 5)
    clean = _whole(pools[1], heads, tokens)
    for bad in (np.nan, np.inf, -np.inf):
        poisoned = tokens.copy()
        poisoned[37:] = bad
        found = _whole(pools[1], heads, poisoned)
        assert found[:37].tobytes() == clean[:37].tobytes()
        assert bool(np.isnan(found[37:]).any(axis=1).all())


def test_a_poisoned_sequence_leaves_its_neighbours_alone(pools):
    heads = _heads(7, 1, 64)
    tokens = _tokens(heads, 40, 6)
    clean = _whole(pools[1], heads, tokens)
    (table, other), num_blocks = _tables(heads, [40, 40], 6)
    step = Step(heads, _kv_pool(pools[2], heads, num_blocks))
    step.add(np.full_like(tokens, np.nan), other, 0, 40).add(tokens, table, 0, 40)
    assert step.run(pools[2])[1].tobytes() == clean.tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_equals_the_torch_twin(pools, dtype):
    heads = _heads(14, 2, 64, dtype=abi.F32 if dtype == torch.float32 else abi.BF16)
    lengths = [70, 1, 33]
    tokens = [_tokens(heads, length, i) for i, length in enumerate(lengths)]
    tables, num_blocks = _tables(heads, lengths, 7)
    caches = [torch.zeros(2, num_blocks * 16 + 1, 64, dtype=dtype) for _ in range(2)]
    twin = PagedAttention(caches[:1], caches[1:], block_size=16, num_heads=14)
    spans, step, first_row = [], Step(heads, _kv_pool(pools[2], heads, num_blocks)), 0
    for one, table in zip(tokens, tables, strict=True):
        spans.append(Span(first_row, len(one), 0, table.astype(np.int64)))
        step.add(one, table, 0, len(one))
        first_row += len(one)
    parts = zip(*(_rotated(heads, one) for one in tokens), strict=True)
    expected = twin.plan(spans).attend(0, *(torch.cat(part) for part in parts))
    tolerance = _tolerance(pools[2].library, heads)
    np.testing.assert_allclose(np.concatenate(step.run(pools[2])), expected.numpy(), atol=tolerance)


def test_queries_and_keys_are_left_rotated_with_the_twin_s_bits(pools):
    heads = _heads(4, 2, 128)
    tokens = _tokens(heads, 50, 8)
    query, key, value = _rotated(heads, tokens)
    (table,), num_blocks = _tables(heads, [50], 8)
    kv_pool = _kv_pool(pools[2], heads, num_blocks)
    units = table * kv_pool.block_stride
    spans = np.array([(0, 50, 0, units.ctypes.data)], SPAN_DTYPE)
    cos, sin = _angles(128)
    attend(pools[2], heads, kv_pool.caches[LAYER], spans=spans, qkv=tokens, cos=cos, sin=sin)
    expected = torch.cat((query, key, value), 1).flatten(1).numpy()
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize("dtype", [abi.F32, abi.BF16])
def test_a_layer_writes_its_own_units_of_a_sequence_s_blocks_and_nothing_else(pools, dtype):
    heads = _heads(2, 1, 32, dtype=dtype)
    tokens, table = _tokens(heads, 48, 9), np.array([4, 0, 3], np.int32)
    kv_pool = _kv_pool(pools[2], heads, 5)
    before = _words(kv_pool).copy()
    Step(heads, kv_pool).add(tokens, table, 0, 48).run(pools[2])
    is_written = (_words(kv_pool) != before).all(axis=2)
    expected = np.zeros((5, 2 * NUM_LAYERS + 1), bool)
    expected[np.ix_(table, [2 * LAYER, 2 * LAYER + 1])] = True
    np.testing.assert_array_equal(is_written, expected)
    np.testing.assert_array_equal(_words(kv_pool)[~expected], before[~expected])


def test_a_pool_is_zero_and_its_units_are_aligned(pools):
    heads = _heads(2, 1, 32)
    kv_pool = NativeKVPool(pools[1].library, heads, num_layers=3, num_blocks=5)
    words = _words(kv_pool)
    assert words.shape == (5, 7, 16 * 32 * 2 // 4)
    assert not words.any()
    units = [address for cache in kv_pool.caches for address in cache]
    assert units == [words[0, unit].ctypes.data for unit in range(6)]
    assert all(unit % 64 == 0 for unit in units)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"head_dim": 48}, "head_dim must be one of 32, 64, 128, got 48"),
        ({"block_size": 8}, "block_size must be one of 16, 32, got 8"),
        ({"num_heads": 5}, "num_heads must be a multiple of num_kv_heads, got 5 and 2"),
        ({"dtype": abi.F16}, r"dtype must be F32 \(0\) or BF16 \(1\), got 2"),
    ],
)
def test_heads_that_the_kernels_do_not_have_are_refused(wrong, message):
    right = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "block_size": 16, "dtype": abi.F32}
    with pytest.raises(ValueError, match=message):
        attention_heads(**{**right, **wrong})
