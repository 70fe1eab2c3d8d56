"""Attention of a device: its paged KV cache, and how a step's rows are spread over kernels.

Not the kernels (`serve.kernels.device`). The one decision behind it: rows of a captured graph that
nobody asked for belong to a sequence of their own, whose one block lies behind all others, so
padding writes and reads memory that no sequence has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.kernels.device import QUERY_TILE, AttentionKernels, Places, Workspace


@dataclass(frozen=True, slots=True)
class DeviceCache:
    """Keys and values of each layer, [num_blocks + 1, block_size, num_kv_heads, head_dim].

    The last block is the scratch block.
    """

    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def make(
        cls,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> DeviceCache:
        """Memory for `num_blocks` blocks and the scratch block."""
        dims = (num_blocks + 1, block_size, num_kv_heads, head_dim)
        caches = [
            [torch.zeros(dims, dtype=dtype, device=device) for _ in range(num_layers)]
            for _ in range(2)
        ]
        return cls(*caches)


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """The rows of a step: `num_decodes` rows of a sequence each, then those of prompts.

    `tiles` covers the latter, int32 [num_tiles, 4] as `AttentionKernels.attend_tiles` wants it;
    None where there are none.
    """

    places: Places
    num_decodes: int
    tiles: Tensor | None = None


class DeviceAttention:
    """Attention over `cache`, for `num_heads` query heads of this rank."""

    def __init__(self, kernels: AttentionKernels, cache: DeviceCache, workspace: Workspace) -> None:
        self._kernels = kernels
        self._workspace = workspace
        self.cache = cache

    def attend(self, layer: int, query: Tensor, step: DeviceStep) -> Tensor:
        """Attend to what the cache holds; the step's own keys are written already.

        Args:
            layer: index of the layer.
            query: [num_rows, num_heads, head_dim], rotated, not scaled.
            step: of these rows.

        Returns:
            [num_rows, num_heads * head_dim].
        """
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        out = torch.empty_like(query)
        num_decodes = step.num_decodes
        if num_decodes:
            self._kernels.attend_decodes(
                query[:num_decodes],
                keys,
                values,
                step.places.first(num_decodes),
                self._workspace,
                out[:num_decodes],
            )
        if step.tiles is not None:
            tables = step.places.block_tables
            self._kernels.attend_tiles(query, keys, values, tables, step.tiles, out)
        return out.flatten(1)


def cut_tiles(
    first_rows: npt.NDArray[np.int64],
    num_tokens: npt.NDArray[np.int64],
    first_positions: npt.NDArray[np.int64],
    slots: npt.NDArray[np.int32],
) -> npt.NDArray[np.int32]:
    """Tiles of prompts' chunks, int32 [num_tiles, 4]: first row, rows, first position, slot.

    Tiles start at multiples of `QUERY_TILE` of the position, so that a row's neighbours, and with
    them its bits, do not depend on how its prompt was cut into chunks.
    """
    tiles = []
    parts = (first_rows.tolist(), num_tokens.tolist(), first_positions.tolist(), slots.tolist())
    for row, count, position, slot in zip(*parts, strict=True):
        end = position + count
        start = position
        while start < end:
            stop = min(end, (start // QUERY_TILE + 1) * QUERY_TILE)
            tiles.append((row + start - position, stop - start, start, slot))
            start = stop
    return np.array(tiles, np.int32).reshape(-1, 4)
