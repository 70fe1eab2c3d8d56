"""Logits have the same bits whatever the batch, the chunks and the threads, in both dtypes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.config import Kernels
from serve.model.tensor_parallel import SingleRank
from serve.testing.loaded_model import LoadedModel

MAX_TOKENS = 150
NUM_SEQUENCES = 8

NATIVE_14_2 = {"num_heads": 14, "num_kv_heads": 2, "head_dim": 32}
NATIVE_3_1 = {"num_heads": 3, "num_kv_heads": 1, "head_dim": 64, "ffn": 104}

CASES = {
    "14/2-bfloat16": ("torch", {"num_heads": 14, "num_kv_heads": 2}, "bfloat16"),
    "3/1-float32": ("torch", {"num_heads": 3, "num_kv_heads": 1}, "float32"),
    "native-14/2-float32": ("native", NATIVE_14_2, "float32"),
    "native-14/2-bfloat16": ("native", NATIVE_14_2, "bfloat16"),
    "native-3/1-bfloat16": ("native", NATIVE_3_1, "bfloat16"),
}


@dataclass(frozen=True)
class _Models:
    """The same model on one thread and on two."""

    one: LoadedModel
    two: LoadedModel


@pytest.fixture(scope="module", params=CASES)
def models(
    request: pytest.FixtureRequest,
    checkpoint: Callable[..., Path],
    kernels_of: Callable[[str], Kernels],
) -> Iterator[_Models]:
    wanted, options, dtype = CASES[request.param]
    before = torch.get_num_threads()
    loaded = [
        LoadedModel(
            checkpoint(**options, dtype=dtype),
            SingleRank(),
            kernels=kernels_of(wanted),
            dtype=dtype,
            num_sequences=NUM_SEQUENCES,
            max_tokens=MAX_TOKENS,
            num_threads=num_threads,
        )
        for num_threads in (1, 2)
    ]
    yield _Models(*loaded)
    torch.set_num_threads(before)


@settings(max_examples=12, deadline=None)
@given(
    num_tokens=st.integers(2, MAX_TOKENS),
    cuts=st.sets(st.integers(1, MAX_TOKENS), max_size=4),
    neighbours=st.lists(st.integers(1, 60), max_size=7),
    num_threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_bits_do_not_depend_on_chunks_batch_or_threads(
    models, num_tokens, cuts, neighbours, num_threads, seed
):
    random = np.random.default_rng(seed)
    ids = random.integers(0, 131, num_tokens).tolist()
    torch.set_num_threads(1)
    alone = models.one.step([(0, 0, ids)])[0]
    torch.set_num_threads(num_threads)
    model = models.one if num_threads == 1 else models.two
    others = [
        (number, 0, random.integers(0, 131, count).tolist())
        for number, count in enumerate(neighbours, start=1)
    ]
    bounds = [0, *sorted(cut for cut in cuts if cut < num_tokens), num_tokens]
    for start, end in itertools.pairwise(bounds):
        place = int(random.integers(0, len(others) + 1))
        parts = [*others[:place], (0, start, ids[start:end]), *others[place:]]
        assert np.array_equal(model.step(parts)[place], alone[start:end])


def test_rows_that_are_not_sampled_change_no_bit_of_those_that_are(models):
    parts = [(0, 0, list(range(40))), (1, 0, [5]), (2, 0, list(range(60, 85)))]
    whole = np.concatenate(models.one.step(parts))
    rows = [0, 39, 40, 65]
    assert np.array_equal(models.one.step(parts, rows)[0], whole[rows])


def test_decode_gives_the_bits_of_prefill(models):
    ids = list(range(40))
    whole = models.one.step([(0, 0, ids)])[0]
    first = models.one.step([(0, 0, ids[:10])])[0]
    steps = [models.one.step([(0, position, [ids[position]])])[0] for position in range(10, 40)]
    assert np.array_equal(np.concatenate([first, *steps]), whole)


def test_a_batch_of_sequences_decodes_with_the_bits_of_one(models):
    prompts = [list(range(7 + 3 * i)) for i in range(8)]
    alone = [models.one.step([(0, 0, prompt), (1, 0, [1])])[0][-1] for prompt in prompts]
    models.two.step([(number, 0, prompt[:-1]) for number, prompt in enumerate(prompts)])
    together = models.two.step(
        [(number, len(prompt) - 1, prompt[-1:]) for number, prompt in enumerate(prompts)]
    )
    assert all(np.array_equal(row[0], one) for row, one in zip(together, alone, strict=True))
