"""Our decoder gives transformers' logits, split and whole, tied and untied, with YaRN or not."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from serve.config import Kernels
from serve.kernels.dtypes import DtypeName
from serve.model.tensor_parallel import Collectives
from serve.testing.loaded_model import LoadedModel
from serve.testing.ranks import run_ranks

NUM_PROMPT_TOKENS = 86
NUM_GREEDY_TOKENS = 64
NUM_TOKENS = NUM_PROMPT_TOKENS + NUM_GREEDY_TOKENS

HEADS_14_2 = {"num_heads": 14, "num_kv_heads": 2}
HEADS_28_4 = {"num_heads": 28, "num_kv_heads": 4, "ffn": 128}
HEADS_12_2 = {"num_heads": 12, "num_kv_heads": 2}
YARN = {"yarn_factor": 4.0, "max_positions": 64}
# of the heads and of ffn that the kernels compute, the ragged ones included
HEAD_32 = {"head_dim": 32, "ffn": 104}
WIDE_HEAD = {"head_dim": 64, "num_layers": 3, "vocab_size": 300}
WIDEST_HEAD = {"head_dim": 128, "num_heads": 2, "num_kv_heads": 1, "is_tied": False}

CASES = [
    pytest.param("torch", HEADS_14_2, 1, id="14/2-tied-tp1"),
    pytest.param("torch", HEADS_14_2, 2, id="14/2-tied-tp2"),
    pytest.param("torch", HEADS_28_4 | {"is_tied": False}, 2, id="28/4-untied-tp2"),
    pytest.param("torch", HEADS_12_2 | {"is_tied": False}, 4, id="12/2-untied-tp4-kv-copied"),
    pytest.param("torch", HEADS_28_4 | YARN | {"is_tied": False}, 4, id="28/4-yarn-untied-tp4"),
    pytest.param("torch", WIDE_HEAD, 2, id="4/2-wide-head-tp2"),
    pytest.param("native", HEADS_14_2 | HEAD_32, 1, id="native-14/2-tied-tp1"),
    pytest.param("native", HEADS_14_2 | HEAD_32, 2, id="native-14/2-tied-tp2"),
    pytest.param(
        "native", HEADS_28_4 | HEAD_32 | {"is_tied": False}, 4, id="native-28/4-untied-tp4"
    ),
    pytest.param("native", HEADS_12_2 | HEAD_32 | YARN, 4, id="native-12/2-yarn-tp4-kv-copied"),
    pytest.param("native", WIDE_HEAD, 2, id="native-4/2-wide-head-tp2"),
    pytest.param("native", WIDEST_HEAD, 1, id="native-2/1-widest-head-untied-tp1"),
]


def _logits(
    path: Path,
    collectives: Collectives,
    token_ids: Sequence[int],
    *,
    kernels: Kernels,
    chunks: Sequence[int],
    dtype: DtypeName = "float32",
) -> np.ndarray | None:
    """Logits of every position, the tokens fed in chunks that end at `chunks`."""
    model = LoadedModel(path, collectives, kernels=kernels, dtype=dtype)
    rows = [
        row
        for start, end in itertools.pairwise([0, *chunks])
        for row in model.step([(0, start, token_ids[start:end])])
    ]
    return np.concatenate(rows) if rows else None


def _reference(path: Path, token_ids: Sequence[int]) -> Tensor:
    """transformers' logits of every position."""
    model: Any = Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


@functools.cache
def _greedy(path: Path) -> tuple[list[int], Tensor]:
    """transformers' greedy answer to one prompt, the prompt included, and all its logits."""
    model: Any = Qwen2ForCausalLM.from_pretrained(path)
    prompt = np.random.default_rng(5).integers(0, 130, (1, NUM_PROMPT_TOKENS))
    ids = model.generate(
        torch.from_numpy(prompt),
        attention_mask=torch.ones(1, NUM_PROMPT_TOKENS, dtype=torch.long),
        max_new_tokens=NUM_GREEDY_TOKENS,
        eos_token_id=-1,
        do_sample=False,
    )
    token_ids = ids[0].tolist()
    assert len(token_ids) == NUM_TOKENS
    return token_ids, _reference(path, token_ids)


@pytest.mark.parametrize(("wanted", "options", "size"), CASES)
def test_float32_logits_are_within_1e_4_and_greedy_tokens_equal(
    checkpoint: Callable[..., Path],
    kernels_of: Callable[[str], Kernels],
    wanted: str,
    options: dict[str, Any],
    size: int,
):
    path, kernels = checkpoint(**options), kernels_of(wanted)
    token_ids, expected = _greedy(path)
    # a prefill in two chunks, then one token a step, as the engine would
    chunks = [50, *range(NUM_PROMPT_TOKENS, NUM_TOKENS + 1)]
    found = run_ranks(
        size, lambda rank: _logits(path, rank, token_ids, kernels=kernels, chunks=chunks)
    )[0]
    assert found is not None
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    chosen = found[NUM_PROMPT_TOKENS - 1 : -1].argmax(-1).tolist()
    assert chosen == token_ids[NUM_PROMPT_TOKENS:]


def test_yarn_changes_the_logits(checkpoint: Callable[..., Path]):
    plain, stretched = checkpoint(**HEADS_14_2), checkpoint(**HEADS_14_2 | YARN)
    token_ids = list(range(100))
    differences = _reference(plain, token_ids) - _reference(stretched, token_ids)
    assert differences.abs().max() > 0.01


@pytest.mark.parametrize(("wanted", "size"), [("torch", 1), ("torch", 2), ("native", 2)])
def test_bfloat16_storage_stays_close_to_float32(
    checkpoint: Callable[..., Path], kernels_of: Callable[[str], Kernels], wanted: str, size: int
):
    path = checkpoint(**HEADS_14_2 | HEAD_32, dtype="bfloat16")
    kernels, token_ids = kernels_of(wanted), list(range(100))

    def run(rank: Collectives) -> np.ndarray | None:
        return _logits(path, rank, token_ids, kernels=kernels, chunks=[100], dtype="bfloat16")

    found = run_ranks(size, run)[0]
    # only the KV cache is rounded beyond what the checkpoint itself is
    np.testing.assert_allclose(found, _reference(path, token_ids), rtol=0, atol=0.05)
