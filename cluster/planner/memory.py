"""Where the memory of one GPU goes, or of a machine without one: weights, caches, and what is left.

Not speed (`cluster.planner.speed`). The one decision: the KV cache gets what the fixed parts leave
below a margin, as the engine does it, so "does it fit" and "how many tokens" are one question.
"""

from __future__ import annotations

from dataclasses import dataclass

from serve.catalog import ModelShape
from serve.config import DeviceName, Dtype, EngineConfig
from serve.limits import GPU_MARGIN

GB = 1_000_000_000
BYTES_PER_VALUE: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
# CUDA context with its kernels, the allocator's own, cuBLAS workspaces and captured graphs.
_CUDA_BYTES = 800_000_000
# NCCL's channels and the buffers of our all-reduce, where there is more than one rank.
_COLLECTIVES_BYTES = 400_000_000
# One shard's process on a CPU at most: Python and torch, which native kernels do without.
_SHARD_PROCESS_BYTES = 800_000_000
# Beside the shards: Ray's own processes, the replica and two HTTP processes.
_RAY_BYTES = 2_500_000_000
# The CPU engine's rule for `kv_cache_tokens: auto` (serve.runner.kv_pool).
_CPU_KV_SHARE = 0.4
_CPU_KV_MAX_TOKENS = 131_072


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of one GPU, or of all shards of one replica on a CPU, in bytes.

    `total = reserved + weights + activations + framework + kv + free`. With a model that does not
    fit `kv_bytes` is 0 and `free_bytes` negative: what is missing.
    """

    total_bytes: int
    reserved_bytes: int
    weight_bytes: int
    activation_bytes: int
    framework_bytes: int
    kv_bytes: int
    free_bytes: int
    kv_tokens: int

    @property
    def fixed_bytes(self) -> int:
        """All that is there before the first token is cached."""
        return self.weight_bytes + self.activation_bytes + self.framework_bytes


def gpu_memory(
    shape: ModelShape,
    *,
    size: int,
    usable_bytes: int,
    total_bytes: int,
    engine: EngineConfig,
    bytes_per_value: int = 2,
) -> Memory:
    """The memory of one of `size` GPUs."""
    weights = shape.num_shard_params(size) * bytes_per_value
    activations = activation_bytes(
        shape, size=size, engine=engine, device="cuda", bytes_per_value=bytes_per_value
    )
    framework = _CUDA_BYTES + (_COLLECTIVES_BYTES if size > 1 else 0)
    ours = round(usable_bytes * (1 - GPU_MARGIN))
    per_token = shape.kv_bytes_per_token(bytes_per_value=bytes_per_value, size=size)
    room = ours - weights - activations - framework
    tokens = _kv_tokens(room // per_token, engine)
    return Memory(
        total_bytes=total_bytes,
        reserved_bytes=total_bytes - usable_bytes,
        weight_bytes=weights,
        activation_bytes=activations,
        framework_bytes=framework,
        kv_bytes=tokens * per_token,
        free_bytes=usable_bytes - weights - activations - framework - tokens * per_token
        if room >= 0
        else room,
        kv_tokens=tokens,
    )


def cpu_memory(
    shape: ModelShape,
    *,
    size: int,
    usable_bytes: int,
    total_bytes: int,
    engine: EngineConfig,
    bytes_per_value: int,
) -> Memory:
    """The memory of a replica of `size` shards in one machine or pod."""
    weights = size * shape.num_shard_params(size) * bytes_per_value
    activations = size * activation_bytes(
        shape, size=size, engine=engine, device="cpu", bytes_per_value=4
    )
    framework = _RAY_BYTES + size * _SHARD_PROCESS_BYTES
    room = usable_bytes - weights - activations - framework
    per_token = size * shape.kv_bytes_per_token(bytes_per_value=bytes_per_value, size=size)
    auto = min(_CPU_KV_MAX_TOKENS, int(max(0, usable_bytes - weights) * _CPU_KV_SHARE) // per_token)
    tokens = _kv_tokens(min(auto, max(0, room) // per_token), engine)
    return Memory(
        total_bytes=total_bytes,
        reserved_bytes=total_bytes - usable_bytes,
        weight_bytes=weights,
        activation_bytes=activations,
        framework_bytes=framework,
        kv_bytes=tokens * per_token,
        free_bytes=room - tokens * per_token,
        kv_tokens=tokens,
    )


def cpu_pod_bytes(
    shape: ModelShape, *, size: int, engine: EngineConfig, bytes_per_value: int
) -> int:
    """Memory that a pod needs so that the engine's own choice of KV slots always fits in it."""
    weights = size * shape.num_shard_params(size) * bytes_per_value
    activations = size * activation_bytes(
        shape, size=size, engine=engine, device="cpu", bytes_per_value=4
    )
    per_token = size * shape.kv_bytes_per_token(bytes_per_value=bytes_per_value, size=size)
    tokens = engine.kv_cache_tokens
    tokens = _CPU_KV_MAX_TOKENS if tokens == "auto" else tokens
    framework = _RAY_BYTES + size * _SHARD_PROCESS_BYTES
    return weights + activations + framework + tokens * per_token


def activation_bytes(
    shape: ModelShape,
    *,
    size: int,
    engine: EngineConfig,
    device: DeviceName,
    bytes_per_value: int,
) -> int:
    """The largest step of one rank: the residual stream, one layer's products, the logits.

    A token of the step holds the residual and its norm (2 hidden), Q, K, V and the attention's
    result, or the MLP's gate, up and product (3 ffn / size), whichever is more; a sequence of the
    step holds its logits in float32, and a copy that the sampler sorts.
    """
    heads = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim // size
    widest = 2 * shape.hidden + max(heads, 3 * shape.ffn // size)
    logits = 2 * 4 * shape.vocab_size * engine.max_running_sequences
    return engine.budget(device) * widest * bytes_per_value + logits


def _kv_tokens(room_tokens: int, engine: EngineConfig) -> int:
    """Whole blocks, and no more than the configuration asks for."""
    tokens = max(0, room_tokens)
    if engine.kv_cache_tokens != "auto":
        tokens = min(tokens, engine.kv_cache_tokens)
    return tokens // engine.block_size * engine.block_size
