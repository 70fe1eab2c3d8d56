"""Paged attention in C++: the sizes it has, and a thin caller of `shoal_attend`.

Not the cache, whose memory the caller has. The one decision behind it: sizes are refused here, in
words, once for a model; the kernels trust them.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from . import abi
from .native import Pool

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


def attend(
    pool: Pool,
    heads: abi.Heads,
    cache: tuple[int, int],
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
        heads: the same that the cache was made for.
        cache: a layer's: where the keys and the values of block 0 lie.
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
        *cache,
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
