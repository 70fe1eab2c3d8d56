"""Paged attention in C++: its cache, and a thin caller of `shoal_attend`.

Not what decides which block is whose. The one decision behind it: the cache's memory is mapped, not
written, so a block costs nothing until a token is put there, and nothing that reads it depends on
what an unwritten slot holds.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import numpy.typing as npt

from . import abi
from .native import NativeLibrary, Pool

HEAD_DIMS = (32, 64, 128)
BLOCK_SIZES = (16, 32)

SPAN_DTYPE = np.dtype(abi.Span)
"""`shoal_span`. `block_table` is the address of an int32 array that lives as long as the call."""


def attention_heads(
    *, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: int
) -> abi.Heads:
    """One rank's heads and their cache, as the kernels want them.

    Args:
        num_heads: query heads.
        num_kv_heads: heads of keys and values.
        head_dim: one of `HEAD_DIMS`.
        block_size: slots of a block, one of `BLOCK_SIZES`.
        dtype: of the cache, `abi.F32` or `abi.BF16`.

    Raises:
        ValueError: a size that the kernels do not have.
    """
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {_listed(HEAD_DIMS)}, got {head_dim}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {_listed(BLOCK_SIZES)}, got {block_size}")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}"
        )
    if dtype not in (abi.F32, abi.BF16):
        raise ValueError(f"dtype must be F32 ({abi.F32}) or BF16 ({abi.BF16}), got {dtype}")
    return abi.Heads(num_heads, num_kv_heads, head_dim, block_size, dtype)


class NativeCache:
    """Keys and values of every layer, zero where nothing was written yet.

    Attributes:
        keys: the address of each layer's keys, 64-byte aligned.
        values: the same of its values.
        num_bytes: of all of it, once every slot is written.
    """

    def __init__(
        self, library: NativeLibrary, heads: abi.Heads, *, num_layers: int, num_blocks: int
    ) -> None:
        size = library.functions.shoal_cache_bytes(ctypes.byref(heads), num_blocks)
        stride = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.num_bytes: int = 2 * num_layers * size
        self._memory = mmap.mmap(-1, max(1, 2 * num_layers * stride), flags=mmap.MAP_PRIVATE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._array = np.frombuffer(self._memory, np.uint8)
        first: int = self._array.ctypes.data
        self.keys = [first + 2 * layer * stride for layer in range(num_layers)]
        self.values = [first + (2 * layer + 1) * stride for layer in range(num_layers)]

    def fill(self, word: int) -> None:
        """Set every 32-bit word, as if other sequences had been there before."""
        self.as_array()[:] = word

    def as_array(self) -> npt.NDArray[np.uint32]:
        """All of its memory."""
        return self._array.view(np.uint32)


def attend(
    pool: Pool,
    heads: abi.Heads,
    cache: NativeCache,
    layer: int,
    *,
    spans: npt.NDArray[np.void],
    qkv: npt.NDArray[np.float32],
    cos: npt.NDArray[np.float32],
    sin: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """Rotate, write keys and values to the cache, attend.

    All arrays are contiguous.

    Args:
        pool: threads of the library to use.
        heads: the same that `cache` was made for.
        cache: of the same library.
        layer: whose keys and values.
        spans: `SPAN_DTYPE`; they cover every row once.
        qkv: [num_rows, (num_heads + 2 * num_kv_heads) * head_dim]; left rotated.
        cos: [num_positions, head_dim / 2].
        sin: the same.

    Returns:
        [num_rows, num_heads * head_dim].
    """
    out = np.empty((qkv.shape[0], heads.num_heads * heads.head_dim), np.float32)
    pool.library.functions.shoal_attend(
        pool.handle,
        ctypes.byref(heads),
        cache.keys[layer],
        cache.values[layer],
        spans.ctypes.data,
        len(spans),
        qkv.ctypes.data,
        cos.ctypes.data,
        sin.ctypes.data,
        out.ctypes.data,
    )
    return out


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
