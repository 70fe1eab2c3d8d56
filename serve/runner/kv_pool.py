"""The KV cache's memory: one pair of arrays a layer, divided into blocks.

Who holds which block is the engine's business (`engine.block_manager`). The one decision behind
it: memory is taken at load but touched when a block is first written, so a large pool costs nothing
until it is used.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import torch

from serve.catalog import ModelShape, num_shard_kv_heads
from serve.kernels import abi
from serve.kernels.native import NativeLibrary
from serve.kernels.packed import AlignedMemory
from serve.limits import available_memory_bytes, read_limits

# Share of the memory that is free after the weights are loaded, and the most that auto takes.
_AUTO_MEMORY_SHARE = 0.4
_AUTO_MAX_TOKENS = 131_072


class KVPool:
    """Keys and values of `num_blocks` blocks of `block_size` slots, in torch.

    The last slot, which no block contains, is zero: attention reads it as padding.
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        size: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        dims = (num_shard_kv_heads(shape, size), num_blocks * block_size + 1, shape.head_dim)
        self.keys = [torch.empty(dims, dtype=dtype) for _ in range(shape.num_layers)]
        self.values = [torch.empty(dims, dtype=dtype) for _ in range(shape.num_layers)]
        for cache in (*self.keys, *self.values):
            cache[:, -1].zero_()


class NativeKVPool:
    """Keys and values of `num_blocks` blocks in the layout of the CPU kernels, on huge pages.

    Args:
        library: the kernels, which know the layout.
        heads: of this rank.
        num_layers: of the model.
        num_blocks: blocks of the pool.
    """

    def __init__(
        self, library: NativeLibrary, heads: abi.Heads, *, num_layers: int, num_blocks: int
    ) -> None:
        num_bytes = library.functions.shoal_cache_bytes(ctypes.byref(heads), num_blocks)
        stride = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = AlignedMemory(2 * num_layers * stride)
        keys = range(
            self._memory.address, self._memory.address + num_layers * 2 * stride, 2 * stride
        )
        self.num_blocks = num_blocks
        self.caches: Sequence[tuple[int, int]] = [(start, start + stride) for start in keys]
        """By layer, where its keys and its values lie."""


def auto_kv_cache_tokens(shape: ModelShape, *, size: int, dtype: torch.dtype) -> int:
    """KV slots, in tokens, that free memory, a container's too, allows one of `size` ranks."""
    num_bytes = shape.kv_bytes_per_token(bytes_per_value=dtype.itemsize, size=size)
    available = available_memory_bytes(read_limits()) * _AUTO_MEMORY_SHARE / size
    return min(_AUTO_MAX_TOKENS, int(available) // num_bytes)
