"""Each instruction set's whole pass is the torch reference's, also of those that this CPU lacks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from serve.kernels.dtypes import DtypeName
from serve.kernels.native import NativeLibrary
from serve.model.tensor_parallel import Collectives, SingleRank
from serve.testing.checkpoints import make_checkpoint
from serve.testing.loaded_model import LoadedModel
from serve.testing.ranks import run_ranks

TOKEN_IDS = [(7 * i) % 131 for i in range(40)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("checkpoint"),
        num_heads=7,
        num_kv_heads=1,
        head_dim=32,
        ffn=104,
        dtype="bfloat16",
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)], ids=str)
def test_logits_are_the_references(
    checkpoint: Path, library: NativeLibrary, dtype: DtypeName, tolerance: float
):
    found, expected = (
        LoadedModel(checkpoint, SingleRank(), kernels=kernels, dtype=dtype)
        for kernels in (library, "torch")
    )
    parts = [(0, 0, TOKEN_IDS[:30])], [(0, 30, TOKEN_IDS[30:])]
    for part in parts:
        np.testing.assert_allclose(
            found.step(part)[0], expected.step(part)[0], rtol=0, atol=tolerance
        )


def test_bits_are_the_same_in_chunks_in_company_and_on_two_threads(
    checkpoint: Path, library: NativeLibrary
):
    one, two = (
        LoadedModel(
            checkpoint,
            SingleRank(),
            kernels=library,
            dtype="bfloat16",
            num_sequences=6,
            num_threads=num_threads,
        )
        for num_threads in (1, 2)
    )
    whole = one.step([(0, 0, TOKEN_IDS)])[0]
    company = [(sequence, 0, TOKEN_IDS[sequence:]) for sequence in range(1, 6)]
    for start, end in ((0, 17), (17, 39), (39, 40)):
        chunk = (0, start, TOKEN_IDS[start:end])
        assert np.array_equal(two.step([*company, chunk])[-1], whole[start:end])


def test_two_ranks_give_one_ranks_logits(checkpoint: Path, library: NativeLibrary):
    path = make_checkpoint(checkpoint / "two", num_heads=4, num_kv_heads=2, head_dim=32)

    def run(rank: Collectives) -> list[np.ndarray]:
        return LoadedModel(path, rank, kernels=library).step([(0, 0, TOKEN_IDS)])

    [alone], [split, other] = run_ranks(1, run), run_ranks(2, run)
    np.testing.assert_allclose(split[0], alone[0], rtol=0, atol=1e-4)
    assert other == []
