"""Every way to lay a model out on a node: how it is split, how many copies, what each can hold.

Not which one is best (`cluster.planner.choice`). The one decision: a layout that does not work is
kept with its reason, so that "why not TP 8" has an answer in the same table.
"""

from __future__ import annotations

from dataclasses import dataclass

from serve.catalog import (
    ModelShape,
    is_stretchable,
    legal_tensor_parallel_sizes,
    stretch_with_yarn,
    tensor_parallel_problem,
)
from serve.config import EngineConfig

from .hardware import Node
from .memory import GB, Memory, cpu_memory, gpu_memory
from .speed import Device, Roofline

# YaRN is static and costs a little on short texts: it is switched on by itself only where at least
# this many full-length sequences can run at once.
YARN_SEQUENCES = 4
_SHORTER = (32_768, 16_384, 8_192, 4_096)
CONTEXTS = (4_096, 32_768, 131_072)


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of a layout: limits of the engine, and lengths where the user gave them."""

    engine: EngineConfig
    max_model_len: int | None = None
    yarn: bool | None = None
    bytes_per_value: int = 2

    def longest(self, shape: ModelShape) -> int:
        """Tokens of the longest sequence that the model could be asked for."""
        can_stretch = is_stretchable(shape) and self.yarn is not False
        return stretch_with_yarn(shape).max_positions if can_stretch else shape.max_positions


@dataclass(frozen=True, slots=True)
class Layout:
    """A model split over `size` ranks, `num_replicas` times in a node.

    `problem` says why it cannot run; then `max_model_len` is 0.
    """

    shape: ModelShape
    size: int
    num_replicas: int
    memory: Memory
    max_model_len: int
    yarn: bool
    problem: str | None
    bytes_per_value: int = 2

    def roofline(self, device: Device) -> Roofline:
        """The speed of one copy on that device."""
        return Roofline(self.shape, self.size, device, self.bytes_per_value)

    def num_sequences(self, context_tokens: int) -> int:
        """Sequences of that many tokens that the KV cache of one replica holds at once."""
        return self.memory.kv_tokens // context_tokens


def layouts_of(shape: ModelShape, node: Node, demand: Demand) -> list[Layout]:
    """One layout for each power of two and each legal size, as far as the node has GPUs."""
    most = node.num_gpus or node.num_cores or 1
    wanted = {size for size in legal_tensor_parallel_sizes(shape) if size <= most}
    powers = {1 << power for power in range(most.bit_length()) if node.num_gpus}
    return [layout_of(shape, node, size, demand) for size in sorted(wanted | powers)]


def layout_of(shape: ModelShape, node: Node, size: int, demand: Demand) -> Layout:
    """The layout of one size, with the reason if it cannot run."""
    is_legal = tensor_parallel_problem(shape, size) is None
    memory = _memory(shape, node, size if is_legal else 1, demand)
    length, is_stretched = _length(shape, memory.kv_tokens, demand)
    problem = _problem(shape, node, size, memory, length, demand)
    return Layout(
        shape=stretch_with_yarn(shape) if is_stretched else shape,
        size=size,
        num_replicas=max(1, node.num_gpus // size) if node.num_gpus else 1,
        memory=memory,
        max_model_len=0 if problem else length,
        yarn=is_stretched,
        problem=problem,
        bytes_per_value=demand.bytes_per_value,
    )


def _memory(shape: ModelShape, node: Node, size: int, demand: Demand) -> Memory:
    measure = gpu_memory if node.num_gpus else cpu_memory
    return measure(
        shape,
        size=size,
        usable_bytes=node.usable_bytes,
        total_bytes=node.total_bytes,
        engine=demand.engine,
        bytes_per_value=demand.bytes_per_value,
    )


def _length(shape: ModelShape, kv_tokens: int, demand: Demand) -> tuple[int, bool]:
    """Tokens of the longest sequence to allow, and whether the positions are stretched for it."""
    can_stretch = is_stretchable(shape) and demand.yarn is not False
    if demand.max_model_len is not None:
        is_longer = demand.max_model_len > shape.max_positions
        return demand.max_model_len, demand.yarn is True or (is_longer and can_stretch)
    if can_stretch:
        longest = stretch_with_yarn(shape).max_positions
        if demand.yarn is True or kv_tokens >= YARN_SEQUENCES * longest:
            return longest, True
    lengths = sorted({shape.max_positions, *_SHORTER}, reverse=True)
    fitting = [length for length in lengths if length <= min(kv_tokens, shape.max_positions)]
    return (fitting[0] if fitting else 0), False


def _problem(
    shape: ModelShape, node: Node, size: int, memory: Memory, length: int, demand: Demand
) -> str | None:
    illegal = tensor_parallel_problem(shape, size)
    if illegal is not None:
        return "not legal: " + illegal.partition(": ")[2]
    if node.num_gpus and size > node.num_gpus:
        return f"needs {size} GPUs, a node has {node.num_gpus}"
    if memory.free_bytes < 0 or length == 0:
        workspace = memory.fixed_bytes - memory.weight_bytes
        need = f"weights {memory.weight_bytes / GB:.1f} GB + workspace {workspace / GB:.1f} GB"
        usable = f"{(memory.total_bytes - memory.reserved_bytes) / GB:.1f} GB usable"
        if memory.free_bytes < 0:
            return f"{need} are more than the {usable}"
        return f"{need} leave room for {memory.kv_tokens:,} tokens of KV cache in {usable}"
    if memory.kv_tokens < length:
        return (
            f"the KV cache holds {memory.kv_tokens:,} tokens, less than one sequence of"
            f" max_model_len {length:,}"
        )
    return None
