"""The KV cache's memory in torch, for the reference; `.kv_pool` has the native kernels'."""

from __future__ import annotations

import math

import torch

from serve.catalog import ModelShape, num_shard_kv_heads

from .kv_pool import taking


class TorchKVPool:
    """Keys and values of `num_blocks` blocks of `block_size` slots.

    The last slot, which no block contains, is zero: attention reads it as padding.

    Raises:
        ConfigurationError: the system does not give as much memory.
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
        num_bytes = 2 * shape.num_layers * math.prod(dims) * dtype.itemsize
        with taking(num_bytes, num_blocks):
            self.keys = [torch.empty(dims, dtype=dtype) for _ in range(shape.num_layers)]
            self.values = [torch.empty(dims, dtype=dtype) for _ in range(shape.num_layers)]
        for cache in (*self.keys, *self.values):
            cache[:, -1].zero_()
