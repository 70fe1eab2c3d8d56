"""The KV cache's memory, divided into blocks.

Who holds which block is the engine's business (`engine.block_manager`). The one decision behind
it: memory is taken at load but touched when a block is first written, so a large pool costs nothing
until it is used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil

from serve.catalog import ModelShape
from serve.errors import ConfigurationError
from serve.kernels import abi
from serve.kernels.native import NativeLibrary
from serve.kernels.packed import AlignedMemory
from serve.limits import available_memory_bytes, read_limits

# Share of the memory that is free after the weights are loaded, and the most that auto takes.
_AUTO_MEMORY_SHARE = 0.4
_AUTO_MAX_TOKENS = 131_072
_GB = 1e9


class NativeKVPool:
    """Keys and values of `num_blocks` blocks in the layout of the CPU kernels, on huge pages.

    A block's keys and values of all layers lie together, so that a few long sequences fill a few
    huge pages instead of one for each layer. Each is a unit, and kernels count units::

        block 0: layer 0's keys, its values, layer 1's keys, ..., one unit left free; block 1: ...

    so block i begins at unit i * `block_stride`. The free unit makes that odd: with an even number
    of units, often a multiple of a cache's way, one layer's blocks would push each other out of it.

    Args:
        library: the kernels, which know the size of a unit.
        heads: of this rank.
        num_layers: of the model.
        num_blocks: blocks of the pool.

    Raises:
        ConfigurationError: the system does not give as much memory.
    """

    def __init__(
        self, library: NativeLibrary, heads: abi.Heads, *, num_layers: int, num_blocks: int
    ) -> None:
        unit_bytes: int = library.functions.shoal_cache_bytes(ctypes.byref(heads), 1)
        self.num_blocks = num_blocks
        self.block_stride = 2 * num_layers + 1
        num_bytes = num_blocks * self.block_stride * unit_bytes
        with taking(num_bytes, num_blocks):
            self.memory = AlignedMemory(num_bytes)
            """All blocks; zero where none was written."""
        keys = [self.memory.address + 2 * layer * unit_bytes for layer in range(num_layers)]
        self.caches: Sequence[tuple[int, int]] = [(start, start + unit_bytes) for start in keys]
        """By layer, where block 0's keys and its values lie."""


@contextmanager
def taking(num_bytes: int, num_blocks: int) -> Iterator[None]:
    """Say in plain words that a pool's memory, taken inside, is not to be had.

    What is taken is only promised: more than all memory would be missed when it is used.
    """
    try:
        if num_bytes > _all_memory_bytes():
            raise MemoryError
        yield
    except (MemoryError, OSError, OverflowError, RuntimeError) as exc:  # the last is torch's
        raise ConfigurationError(
            f"a KV cache of {num_blocks} blocks takes {num_bytes / _GB:.1f} GB a shard, more than"
            f" this machine gives ({_all_memory_bytes() / _GB:.1f} GB in all,"
            f" {available_memory_bytes(read_limits()) / _GB:.1f} GB free): lower"
            " engine.kv_cache_tokens, or leave it out for what memory allows"
        ) from exc


def _all_memory_bytes() -> int:
    """The machine's memory, or what a container may have of it."""
    most = int(psutil.virtual_memory().total)
    return min(most, read_limits().memory_bytes or most)


def auto_kv_cache_tokens(shape: ModelShape, *, size: int, bytes_per_value: int) -> int:
    """KV slots, in tokens, that free memory, a container's too, allows one of `size` ranks."""
    num_bytes = shape.kv_bytes_per_token(bytes_per_value=bytes_per_value, size=size)
    available = available_memory_bytes(read_limits()) * _AUTO_MEMORY_SHARE / size
    return min(_AUTO_MAX_TOKENS, int(available) // num_bytes)
