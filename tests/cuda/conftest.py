from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from serve.checkpoint import inspect_checkpoint
from serve.kernels.dtypes import DtypeName
from serve.model.tensor_parallel import Collectives, SingleRank
from serve.runner.cuda import CudaRunner
from serve.runner.cuda_loading import DeviceOptions, load_cuda_runner
from serve.runner.loading import load_runner
from serve.runner.model_runner import ModelRunner
from serve.runner.plan import RunnerPlan
from serve.testing.checkpoints import make_checkpoint

BLOCK_SIZE = 16
NUM_REAL_TOKENS = 140
EOS = 139
MAX_SLOTS = 20
TOKEN_BUDGET = 512


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 8 query and 4 KV heads: legal at TP 1, 2 and 4."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return make_checkpoint(folder, num_heads=8, num_kv_heads=4, vocab_size=150)


@pytest.fixture
def load_device(checkpoint: Path) -> Callable[..., CudaRunner]:
    """A runner whose device is the CPU: its protocol, padding, feed and sampling are the GPU's."""

    def load(
        rank: Collectives | None = None,
        device: str = "cpu",
        dtype: DtypeName = "float32",
        **options: Any,
    ) -> CudaRunner:
        found = inspect_checkpoint(checkpoint)
        plan = RunnerPlan(
            checkpoint=found,
            shape=found.shape,
            collectives=rank or SingleRank(),
            dtype=dtype,
            block_size=BLOCK_SIZE,
            num_threads=1,
            num_real_tokens=NUM_REAL_TOKENS,
            eos_token_ids=(EOS,),
            max_running_sequences=MAX_SLOTS,
            max_model_len=512,
            kv_cache_tokens=100 * BLOCK_SIZE,
            on_progress=None,
        )
        return load_cuda_runner(plan, DeviceOptions(torch.device(device), TOKEN_BUDGET, **options))

    return load


@pytest.fixture
def reference(checkpoint: Path) -> ModelRunner:
    """The reference in torch, on the CPU."""
    return load_runner(
        path=checkpoint,
        collectives=SingleRank(),
        dtype="float32",
        block_size=BLOCK_SIZE,
        num_threads=1,
        num_real_tokens=NUM_REAL_TOKENS,
        eos_token_ids=(EOS,),
        max_running_sequences=MAX_SLOTS,
        token_budget=TOKEN_BUDGET,
        kernels="torch",
        kv_cache_tokens=100 * BLOCK_SIZE,
        max_model_len=512,
    )
