"""Reference attention over the paged KV cache, batch-invariant on CPU.

Gathers keys and values by slot and hands query tiles to `kernels.attention`. Which rows and slots
these are is planned once a step (`.tiles`); a layer costs two gathers and the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from serve.kernels.attention import KV_TILE_TOKENS, attend_tiles

from .protocol import Span
from .tiles import Part, Tiling


class PagedAttention:
    """An `AttentionBackend` in torch.

    Args:
        keys: one tensor a layer, [num_kv_heads, num_slots + 1, head_dim]; the last slot stays zero
            and stands in for the slots behind a sequence's end.
        values: the same.
        block_size: slots of a block.
        num_heads: query heads of this rank, a multiple of the KV heads.
    """

    def __init__(
        self, keys: list[Tensor], values: list[Tensor], *, block_size: int, num_heads: int
    ) -> None:
        self._keys = keys
        self._values = values
        num_kv_heads, num_slots, head_dim = keys[0].shape
        self._tiling = Tiling(
            num_kv_heads=num_kv_heads,
            group_size=num_heads // num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            num_slots=num_slots - 1,
        )

    def plan(self, spans: Sequence[Span]) -> PagedStep:
        """Prepare a step whose rows are covered exactly once by `spans`."""
        return PagedStep(
            self._keys,
            self._values,
            tiling=self._tiling,
            slot_mapping=self._tiling.slot_mapping(spans),
            parts=self._tiling.cut(spans),
        )


class PagedStep:
    """A `StepAttention` of `PagedAttention`."""

    def __init__(
        self,
        keys: list[Tensor],
        values: list[Tensor],
        *,
        tiling: Tiling,
        slot_mapping: Tensor,
        parts: list[Part],
    ) -> None:
        self._keys = keys
        self._values = values
        self._tiling = tiling
        self._slot_mapping = slot_mapping
        self._parts = parts

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `StepAttention.attend`."""
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(1, self._slot_mapping, key.transpose(0, 1).to(keys.dtype))
        values.index_copy_(1, self._slot_mapping, value.transpose(0, 1).to(values.dtype))
        scaled = query * self._tiling.head_dim**-0.5
        out = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
        for part in self._parts:
            tiles = self._query_tiles(scaled, part)
            found = attend_tiles(
                tiles, self._gather(keys, part), self._gather(values, part), part.hidden
            )
            tokens = self._tokens(found, part).index_select(0, part.used)
            out.index_copy_(0, part.out_rows, tokens)
        return out

    def _gather(self, cache: Tensor, part: Part) -> Tensor:
        """[num_kv_tiles, groups, tiles or 1, KV_TILE_TOKENS, head_dim] of one cache, float32."""
        found = cache.flatten(0, 1).index_select(0, part.kv_index).float()
        groups = (self._tiling.num_kv_heads, 1) if part.is_shared else (1, -1)
        return found.view(part.num_kv_tiles, *groups, KV_TILE_TOKENS, self._tiling.head_dim)

    def _query_tiles(self, query: Tensor, part: Part) -> Tensor:
        """[groups, tiles, num_tile_rows, head_dim] of [num_tokens, num_heads, head_dim]."""
        tiling = self._tiling
        rows = query.index_select(0, part.query_rows).view(
            -1, part.num_tile_tokens, tiling.num_kv_heads, tiling.group_size, tiling.head_dim
        )
        num_tiles, num_used_rows = rows.shape[0], part.num_tile_tokens * tiling.group_size
        if part.is_shared:
            rows, groups = rows.permute(2, 0, 1, 3, 4), (tiling.num_kv_heads, num_tiles)
        else:
            rows, groups = rows.transpose(1, 2), (1, num_tiles * tiling.num_kv_heads)
        tiles = query.new_zeros(*groups, tiling.num_tile_rows, tiling.head_dim)
        tiles[:, :, :num_used_rows] = rows.reshape(*groups, num_used_rows, tiling.head_dim)
        return tiles

    def _tokens(self, found: Tensor, part: Part) -> Tensor:
        """The reverse: [num_tiles * num_tile_tokens, num_heads * head_dim], padding included."""
        tiling = self._tiling
        heads = (part.num_tile_tokens, tiling.group_size, tiling.head_dim)
        if part.is_shared:
            tokens = found.view(tiling.num_kv_heads, -1, *heads).permute(1, 2, 0, 3, 4)
        else:
            tokens = found.view(-1, tiling.num_kv_heads, *heads).transpose(1, 2)
        return tokens.flatten(2).flatten(0, 1)
