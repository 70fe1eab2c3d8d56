"""From a model folder to a runner: shape, memory, weights of one rank.

The one place that turns options into a model, and that chooses what computes it: native kernels
where the CPU and the shape allow it, else the torch reference, with one line in the log that says
why. torch is imported by what computes in it alone: a shard in native kernels starts seconds sooner
and is hundreds of megabytes smaller without.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from serve.catalog import stretch_with_yarn
from serve.checkpoint import inspect_checkpoint
from serve.errors import CollectiveError, ConfigurationError
from serve.kernels import native
from serve.kernels.native import NativeLibrary
from serve.model.native_decoder import NativeDecoder, native_problem
from serve.model.tensor_parallel import Collectives
from serve.model.weights import Progress, load

from .kv_pool import NativeKVPool
from .loaded_pass import LoadedPass
from .model_runner import ModelRunner, RunnerFacts
from .native_pass import NativePass
from .plan import RunnerPlan
from .sampler import Sampler
from .step_sampler import NativeSampler, ReferenceSampler, StepSampler

if TYPE_CHECKING:
    from serve.config import DeviceName, Dtype, Kernels

    from .cuda import CudaRunner

logger = logging.getLogger("shoal.shard")


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
    token_budget: int,
    device: DeviceName = "cpu",
    kernels: Kernels = "auto",
    kv_cache_tokens: int | None = None,
    max_model_len: int | None = None,
    yarn: bool = False,
    check_group: Callable[[], None] | None = None,
    on_progress: Progress | None = None,
) -> ModelRunner | CudaRunner:
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
        token_budget: most tokens of a step, for which a GPU needs memory.
        device: where to compute.
        kernels: what computes on a CPU; on a GPU, "torch" is torch and all others are Triton.
        kv_cache_tokens: KV slots; None: what memory allows.
        max_model_len: tokens that a sequence may reach; None: the checkpoint's positions.
        yarn: stretch the positions as the Qwen2.5 family publishes it.
        check_group: raises where the ranks' group is broken, for who waits for a GPU.
        on_progress: called with (bytes read, bytes in all) as weights arrive.

    Raises:
        CheckpointError: the folder cannot be used.
        ConfigurationError: the options do not fit the checkpoint, or this CPU cannot run the
            kernels that are named or that other ranks run.
        CollectiveError: another rank is gone or cannot take part.
    """
    checkpoint = inspect_checkpoint(path)
    shape = stretch_with_yarn(checkpoint.shape) if yarn else checkpoint.shape
    max_model_len = shape.max_positions if max_model_len is None else max_model_len
    plan = RunnerPlan(
        checkpoint=checkpoint,
        shape=shape,
        collectives=collectives,
        dtype=dtype,
        block_size=block_size,
        num_threads=num_threads,
        num_real_tokens=num_real_tokens,
        eos_token_ids=eos_token_ids,
        max_running_sequences=max_running_sequences,
        max_model_len=max_model_len,
        kv_cache_tokens=kv_cache_tokens,
        on_progress=on_progress,
    )
    plan.check()
    if device == "cuda":
        import torch

        from .cuda_loading import DeviceOptions, load_cuda_runner

        options = DeviceOptions(
            torch.device("cuda"),
            token_budget=token_budget,
            kernels="torch" if kernels == "torch" else "auto",
            check_group=check_group,
        )
        return load_cuda_runner(plan, options)
    return load_cpu_runner(plan, kernels)


def load_cpu_runner(plan: RunnerPlan, kernels: Kernels) -> ModelRunner:
    """Load a checked plan on this machine's CPU; errors as `load_pass`."""
    return _make_runner(plan, load_pass(plan, kernels))


def load_pass(plan: RunnerPlan, kernels: Kernels) -> LoadedPass:
    """Load weights and take the KV pool's memory.

    Raises:
        CheckpointError: the folder cannot be used.
        ConfigurationError: this CPU cannot run the named kernels, or none where other ranks can;
            or no KV block fits.
        CollectiveError: another rank is gone, or computes in torch where this one does not.
    """
    library, reason = _choose_library(plan, kernels)
    _check_ranks_agree(plan.collectives, library, reason)
    if library is not None:
        return load_native(plan, library)
    from .torch_loading import load_torch

    return load_torch(plan)


def _choose_library(plan: RunnerPlan, kernels: Kernels) -> tuple[NativeLibrary | None, str]:
    """The kernels to use, None for torch, and why; rank 0 says so in the log."""
    library = native.load(kernels)
    reason = native.reason(kernels)
    if library is not None:
        problem = native_problem(
            plan.shape, block_size=plan.block_size, panel_width=library.panel_width
        )
        if problem is not None and kernels != "auto":
            raise ConfigurationError(f"hardware.kernels is {kernels}, but {problem}")
        if problem is not None:
            library, reason = None, problem
    if plan.collectives.rank == 0:
        name = "torch" if library is None else library.isa
        logger.info("CPU kernels: %s (%s); threads a shard: %d", name, reason, plan.num_threads)
    return library, reason


def _check_ranks_agree(
    collectives: Collectives, library: NativeLibrary | None, reason: str
) -> None:
    """Native ranks and ranks in torch do not meet in the same collectives: all or none.

    Native ranks may differ in their instruction set. Whoever computes in torch says why; for the
    others it is a rank that cannot take part.
    """
    is_native = collectives.numbers(library is not None)
    if all(is_native) or not any(is_native):
        return
    if library is None:
        raise ConfigurationError(
            f"rank {collectives.rank} has no CPU kernels ({reason}), rank {is_native.index(1)} has:"
            " give every rank's machine the same, or set hardware.kernels to torch"
        )
    raise CollectiveError(f"rank {is_native.index(0)} has no CPU kernels, this rank has")


def load_native(plan: RunnerPlan, library: NativeLibrary) -> LoadedPass:
    """As `load_pass` with these kernels."""
    pool = library.pool(plan.num_threads)
    decoder = NativeDecoder(
        plan.shape,
        plan.collectives,
        dtype=plan.dtype,
        num_positions=plan.max_model_len,
        block_size=plan.block_size,
        pool=pool,
    )
    num_read_bytes = load(plan.checkpoint, decoder.cuts(), plan.on_progress)
    kv_pool = NativeKVPool(
        library, decoder.heads, num_layers=plan.shape.num_layers, num_blocks=plan.num_blocks()
    )
    forward = NativePass(
        decoder,
        kv_pool,
        plan.collectives,
        pool=pool,
        max_sampled=plan.max_running_sequences,
    )
    return LoadedPass(
        forward,
        pool=pool,
        block_stride=kv_pool.block_stride,
        kernels=library.isa,
        num_total_blocks=kv_pool.num_blocks,
        num_weight_bytes=sum(cut.into.num_bytes for cut in decoder.cuts()),
        num_read_bytes=num_read_bytes,
    )


def _make_runner(plan: RunnerPlan, loaded: LoadedPass) -> ModelRunner:
    sequences = plan.make_sequences(block_stride=loaded.block_stride)
    sampling = plan.make_sampling()
    sampler: StepSampler
    if loaded.pool is not None:
        sampler = NativeSampler(loaded.pool, sampling, num_ids=plan.num_real_tokens)
    else:
        row_sampler = Sampler(
            vocab_size=plan.shape.vocab_size,
            num_real_tokens=plan.num_real_tokens,
            eos_token_ids=plan.eos_token_ids,
        )
        sampler = ReferenceSampler(row_sampler, sequences=sequences, sampling=sampling)
    return ModelRunner(
        loaded.forward,
        sampler,
        sequences=sequences,
        sampling=sampling,
        facts=RunnerFacts(
            kernels=loaded.kernels,
            num_total_blocks=loaded.num_total_blocks,
            max_model_len=plan.max_model_len,
            vocab_size=plan.shape.vocab_size,
            num_weight_bytes=loaded.num_weight_bytes,
            num_read_bytes=loaded.num_read_bytes,
        ),
    )
