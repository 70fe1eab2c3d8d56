"""A model is in memory once: what a prefill needs beside its weights is small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import cast

import psutil
import pytest
import torch
from safetensors.torch import save_file

from serve.catalog import ModelShape
from serve.checkpoint import tensor_shapes
from serve.config import Kernels
from serve.kernels import native
from serve.messages import SamplingParams
from serve.model.tensor_parallel import SingleRank
from serve.runner.loading import load_runner
from serve.runner.model_runner import ModelRunner
from serve.testing.steps import StepWriter

NUM_PROMPT_TOKENS = 128
PARAMS = SamplingParams(seed=0, max_tokens=9)


CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 4096,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}


@pytest.fixture
def large_checkpoint(tmp_path: Path) -> Path:
    """190 MB of zeros, so that what is read ahead and freed again hardly counts."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tensors = {
        name: torch.zeros(shape, dtype=torch.bfloat16)
        for name, shape in tensor_shapes(ModelShape.from_config(CONFIG)).items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_native_weights_and_a_prefill_take_at_most_1_15_times_the_weights(
    checkpoint: Path, large_checkpoint: Path
):
    if native.load() is None:
        pytest.skip(native.reason())
    command = [sys.executable, __file__, str(checkpoint), str(large_checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown, num_weight_bytes = json.loads(done.stdout)
    num_params = ModelShape.from_config(CONFIG).num_params
    assert num_weight_bytes == pytest.approx(2 * num_params, rel=0.01)
    assert grown <= 1.15 * num_weight_bytes


def measure(checkpoint: Path, large_checkpoint: Path) -> tuple[int, int]:
    """Bytes by which this process grew, and of weights; in a process that nobody else uses."""
    library = native.load()
    assert library is not None
    kernels, process = cast(Kernels, library.isa), psutil.Process()
    _prefill(_load(checkpoint, kernels, num_real_tokens=100), 100)  # code that is used once more
    before = process.memory_info().rss
    runner = _load(large_checkpoint, kernels, num_real_tokens=49_152)
    _prefill(runner, NUM_PROMPT_TOKENS)
    return process.memory_info().rss - before, runner.facts.num_weight_bytes


def _load(path: Path, kernels: Kernels, *, num_real_tokens: int) -> ModelRunner:
    return load_runner(
        path=path,
        collectives=SingleRank(),
        dtype="bfloat16",
        block_size=16,
        num_threads=1,
        num_real_tokens=num_real_tokens,
        eos_token_ids=(),
        max_running_sequences=4,
        token_budget=512,
        kernels=kernels,
        kv_cache_tokens=65_536,
    )


def _prefill(runner: ModelRunner, num_tokens: int) -> None:
    writer = StepWriter(runner, 16)
    writer.add(0, [token_id % 100 for token_id in range(num_tokens)], PARAMS)
    writer.step(chunks=[(0, 0, num_tokens)])


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), Path(sys.argv[2]))))
