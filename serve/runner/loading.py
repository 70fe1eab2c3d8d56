"""From a model folder to a runner: shape, memory, weights of one rank.

The one place that turns options into a model. "auto" for the KV cache is resolved here, once, and
agreed on by all ranks: the smallest rank's memory decides.
"""

from __future__ import annotations

from pathlib import Path

import torch

from serve.attention.paged import PagedAttention
from serve.catalog import ModelShape, stretch_with_yarn, tensor_parallel_problem
from serve.checkpoint import inspect_checkpoint
from serve.config import Dtype
from serve.errors import CheckpointError, ConfigurationError
from serve.model.qwen2 import Qwen2Model
from serve.model.tensor_parallel import Collectives
from serve.model.weights import Progress, load

from .kv_pool import KVPool, auto_kv_cache_tokens
from .model_runner import ModelRunner
from .sampler import Sampler

_DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_runner(
    *,
    path: Path,
    collectives: Collectives,
    dtype: Dtype,
    block_size: int,
    num_threads: int,
    num_real_tokens: int,
    eos_token_ids: tuple[int, ...],
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
        num_threads: threads of torch in this process.
        num_real_tokens: ids from here on are padding and never sampled.
        eos_token_ids: held back until a request's `min_tokens`.
        kv_cache_tokens: KV slots; None: what memory allows.
        max_model_len: tokens that a sequence may reach; None: the checkpoint's positions.
        yarn: stretch the positions as the Qwen2.5 family publishes it.
        on_progress: called with (bytes read, bytes in all) as weights arrive.

    Raises:
        CheckpointError: the folder cannot be used.
        ConfigurationError: the options do not fit the checkpoint.
        CollectiveError: another rank is gone.
    """
    torch.set_num_threads(num_threads)
    checkpoint = inspect_checkpoint(path)
    shape = stretch_with_yarn(checkpoint.shape) if yarn else checkpoint.shape
    max_model_len = shape.max_positions if max_model_len is None else max_model_len
    _check(shape, collectives.size, max_model_len=max_model_len, num_real_tokens=num_real_tokens)
    model = Qwen2Model(shape, collectives, dtype=_DTYPES[dtype], num_positions=max_model_len)
    num_read_bytes = load(checkpoint, model.cuts(), on_progress)
    if kv_cache_tokens is None:
        kv_cache_tokens = _agree(
            auto_kv_cache_tokens(shape, size=collectives.size, dtype=_DTYPES[dtype]), collectives
        )
    if kv_cache_tokens < block_size:
        raise ConfigurationError(
            f"the KV cache must hold at least one block ({block_size} tokens),"
            f" got {kv_cache_tokens} tokens"
        )
    pool = KVPool(
        shape,
        size=collectives.size,
        num_blocks=kv_cache_tokens // block_size,
        block_size=block_size,
        dtype=_DTYPES[dtype],
    )
    attention = PagedAttention(
        pool.keys,
        pool.values,
        block_size=block_size,
        num_heads=shape.num_heads // collectives.size,
    )
    return ModelRunner(
        model,
        attention,
        sampler=Sampler(
            vocab_size=shape.vocab_size,
            num_real_tokens=num_real_tokens,
            eos_token_ids=eos_token_ids,
        ),
        block_size=block_size,
        num_total_blocks=pool.num_blocks,
        max_model_len=max_model_len,
        vocab_size=shape.vocab_size,
        num_weight_bytes=sum(cut.into.num_bytes for cut in model.cuts()),
        num_read_bytes=num_read_bytes,
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
