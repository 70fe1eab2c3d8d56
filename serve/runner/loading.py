"""From a model folder to a runner: shape, memory, weights of one rank.

The one place that turns options into a model. "auto" for the KV cache is resolved here, once, and
agreed on by all ranks: the smallest rank's memory decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from serve.attention.paged import PagedAttention
from serve.catalog import ModelShape, stretch_with_yarn, tensor_parallel_problem
from serve.checkpoint import Checkpoint, inspect_checkpoint
from serve.config import Dtype
from serve.errors import CheckpointError, ConfigurationError
from serve.model.qwen2 import Qwen2Model
from serve.model.tensor_parallel import Collectives
from serve.model.weights import Progress, load

from .batch import SequenceTable
from .kv_pool import KVPool, auto_kv_cache_tokens
from .model_runner import ModelRunner, RunnerFacts
from .sampler import Sampler
from .sampling_table import SamplingTable
from .step_sampler import ReferenceSampler
from .torch_pass import TorchPass

_DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class RunnerPlan:
    """What to load, checked: options that fit the checkpoint in `checkpoint`.

    `shape` is the checkpoint's, stretched where YaRN was asked for. `kv_cache_tokens` None: what
    memory allows.
    """

    checkpoint: Checkpoint
    shape: ModelShape
    collectives: Collectives
    dtype: torch.dtype
    block_size: int
    num_threads: int
    num_real_tokens: int
    eos_token_ids: tuple[int, ...]
    max_running_sequences: int
    max_model_len: int
    kv_cache_tokens: int | None
    on_progress: Progress | None

    def make_sequences(self) -> SequenceTable:
        """An empty table for as many sequences as may run."""
        return SequenceTable(
            max_slots=self.max_running_sequences,
            max_tokens=self.max_model_len,
            block_size=self.block_size,
        )

    def make_sampling(self) -> SamplingTable:
        """The same of their sampling parameters."""
        return SamplingTable(
            max_slots=self.max_running_sequences,
            num_ids=self.num_real_tokens,
            eos_token_ids=self.eos_token_ids,
        )

    def num_blocks(self) -> int:
        """Blocks of the KV pool, the same on every rank; asked once the weights are loaded.

        Raises:
            ConfigurationError: not even one block fits.
        """
        num_tokens = self.kv_cache_tokens
        if num_tokens is None:
            size = self.collectives.size
            mine = auto_kv_cache_tokens(self.shape, size=size, dtype=self.dtype)
            num_tokens = _agree(mine, self.collectives)
        if num_tokens < self.block_size:
            raise ConfigurationError(
                f"the KV cache must hold at least one block ({self.block_size} tokens),"
                f" got {num_tokens} tokens"
            )
        return num_tokens // self.block_size


def load_runner(
    *,
    path: Path,
    collectives: Collectives,
    dtype: Dtype,
    block_size: int,
    num_threads: int,
    num_real_tokens: int,
    eos_token_ids: tuple[int, ...],
    max_running_sequences: int,
    device: Literal["cpu", "cuda"] = "cpu",
    kv_cache_tokens: int | None = None,
    max_model_len: int | None = None,
    yarn: bool = False,
    on_progress: Progress | None = None,
) -> ModelRunner:
    """Load this rank's part of the model in folder `path`.

    Args:
        path: the model folder.
        collectives: this rank's view of its group; every rank must call this function.
        dtype: what weights and KV cache are stored in; arithmetic is float32 on CPU.
        block_size: KV slots of a block.
        num_threads: threads that compute in this process.
        num_real_tokens: ids from here on are padding and never sampled.
        eos_token_ids: held back until a request's `min_tokens`.
        max_running_sequences: slots of sequences.
        device: where to compute.
        kv_cache_tokens: KV slots; None: what memory allows.
        max_model_len: tokens that a sequence may reach; None: the checkpoint's positions.
        yarn: stretch the positions as the Qwen2.5 family publishes it.
        on_progress: called with (bytes read, bytes in all) as weights arrive.

    Raises:
        CheckpointError: the folder cannot be used.
        ConfigurationError: the options do not fit the checkpoint.
        CollectiveError: another rank is gone.
    """
    checkpoint = inspect_checkpoint(path)
    shape = stretch_with_yarn(checkpoint.shape) if yarn else checkpoint.shape
    max_model_len = shape.max_positions if max_model_len is None else max_model_len
    _check(shape, collectives.size, max_model_len=max_model_len, num_real_tokens=num_real_tokens)
    plan = RunnerPlan(
        checkpoint=checkpoint,
        shape=shape,
        collectives=collectives,
        dtype=_DTYPES[dtype],
        block_size=block_size,
        num_threads=num_threads,
        num_real_tokens=num_real_tokens,
        eos_token_ids=eos_token_ids,
        max_running_sequences=max_running_sequences,
        max_model_len=max_model_len,
        kv_cache_tokens=kv_cache_tokens,
        on_progress=on_progress,
    )
    return _load_torch(plan)


def _load_torch(plan: RunnerPlan) -> ModelRunner:
    """The reference, in torch."""
    torch.set_num_threads(plan.num_threads)
    shape, size = plan.shape, plan.collectives.size
    model = Qwen2Model(shape, plan.collectives, dtype=plan.dtype, num_positions=plan.max_model_len)
    num_read_bytes = load(plan.checkpoint, model.cuts(), plan.on_progress)
    pool = KVPool(
        shape,
        size=size,
        num_blocks=plan.num_blocks(),
        block_size=plan.block_size,
        dtype=plan.dtype,
    )
    attention = PagedAttention(
        pool.keys, pool.values, block_size=plan.block_size, num_heads=shape.num_heads // size
    )
    sampler = Sampler(
        vocab_size=shape.vocab_size,
        num_real_tokens=plan.num_real_tokens,
        eos_token_ids=plan.eos_token_ids,
    )
    sequences, sampling = plan.make_sequences(), plan.make_sampling()
    return ModelRunner(
        TorchPass(model, attention),
        ReferenceSampler(sampler, sequences=sequences, sampling=sampling),
        sequences=sequences,
        sampling=sampling,
        facts=RunnerFacts(
            kernels="torch",
            num_total_blocks=pool.num_blocks,
            max_model_len=plan.max_model_len,
            vocab_size=shape.vocab_size,
            num_weight_bytes=sum(cut.into.num_bytes for cut in model.cuts()),
            num_read_bytes=num_read_bytes,
        ),
    )


def _check(shape: ModelShape, size: int, *, max_model_len: int, num_real_tokens: int) -> None:
    problem = tensor_parallel_problem(shape, size)
    if problem is not None:
        raise ConfigurationError(problem)
    if max_model_len > shape.max_positions:
        raise ConfigurationError(
            f"max_model_len must be <= {shape.max_positions} (the checkpoint's positions),"
            f" got {max_model_len}"
        )
    if num_real_tokens > shape.vocab_size:
        raise CheckpointError(
            f"tokenizer.json has {num_real_tokens} ids, config.json's vocab_size is"
            f" {shape.vocab_size}"
        )


def _agree(num_tokens: int, collectives: Collectives) -> int:
    """The smallest rank's number, on every rank (exact in float32 below 2**24)."""
    mine = torch.zeros(collectives.size)
    mine[collectives.rank] = num_tokens
    return int(collectives.all_reduce(mine).min())
