"""Reference attention over the paged KV cache, batch-invariant on CPU.

Gathers each sequence's keys and values from its blocks and hands tiles of queries to
`kernels.attention`. The one decision behind it: the step's index arithmetic is done once, in numpy,
when the step is planned; a layer then costs two gathers and the arithmetic.

A query tile holds the tokens of one sequence that fit `TILE_ROWS` rows when each brings the query
heads that share a KV head; sequences of one tile (decodes) are computed together, those of several
(prefill chunks) each alone, sharing the gathered KV between their tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.kernels.attention import KV_TILE_TOKENS, attend_tiles
from serve.kernels.linear import TILE_ROWS

from .protocol import Span

# Most values of a gathered key tensor or of the scores at once (32 MiB of float32).
_MAX_VALUES = 1 << 23


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
        self._block_size = block_size
        self.num_kv_heads, num_slots, self.head_dim = keys[0].shape
        self.num_slots = num_slots - 1
        self.group_size = num_heads // self.num_kv_heads
        self.tile_tokens = max(1, TILE_ROWS // self.group_size)
        self.tile_rows = -(-self.tile_tokens * self.group_size // TILE_ROWS) * TILE_ROWS

    def plan(self, spans: Sequence[Span]) -> PagedStep:
        """Prepare a step whose rows are covered exactly once by `spans`."""
        slots = np.concatenate(
            [self._slots(span, span.first_position, span.num_tokens) for span in spans]
        )
        rows = np.concatenate([np.arange(s.first_row, s.first_row + s.num_tokens) for s in spans])
        slot_mapping = np.empty_like(slots)
        slot_mapping[rows] = slots
        short = [span for span in spans if span.num_tokens <= self.tile_tokens]
        parts = [self._plan_batch(batch) for batch in self._batches(short)]
        for span in spans:
            if span.num_tokens > self.tile_tokens:
                parts.extend(self._plan_chunk(piece) for piece in self._pieces(span))
        return PagedStep(self, torch.from_numpy(slot_mapping), parts)

    def write(self, layer: int, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Put keys and values [num_tokens, num_kv_heads, head_dim] into their slots."""
        for cache, new in ((self._keys[layer], key), (self._values[layer], value)):
            cache.index_copy_(1, slot_mapping, new.transpose(0, 1).to(cache.dtype))

    def gather(self, cache: Tensor, part: Part) -> Tensor:
        """One cache's slots of a part, float32 [*kv_shape, KV_TILE_TOKENS, head_dim]."""
        found = cache.flatten(0, 1).index_select(0, part.kv_index).float()
        return found.view(*part.kv_shape, KV_TILE_TOKENS, self.head_dim)

    def attend(self, layer: int, query: Tensor, part: Part, out: Tensor) -> None:
        """Attention of one part of a step; writes the part's rows of `out`."""
        keys, values = self.gather(self._keys[layer], part), self.gather(self._values[layer], part)
        tiles = query.index_select(0, part.query_rows)
        tiles = tiles.view(-1, self.tile_tokens, self.num_kv_heads, self.group_size, self.head_dim)
        # a shared part has one group a KV head, a batched one has one tile a sequence and KV head
        order = (2, 0, 1, 3, 4) if part.is_shared else (0, 2, 1, 3, 4)
        num_used = self.tile_tokens * self.group_size
        padded = query.new_zeros(*part.tile_shape, self.tile_rows, self.head_dim)
        padded[:, :, :num_used] = tiles.permute(order).reshape(
            *part.tile_shape, num_used, self.head_dim
        )
        found = attend_tiles(padded, keys, values, part.hidden)[:, :, :num_used]
        num_tiles, kv_heads = tiles.shape[0], self.num_kv_heads
        outer = (kv_heads, num_tiles) if part.is_shared else (num_tiles, kv_heads)
        found = found.reshape(*outer, self.tile_tokens, self.group_size, self.head_dim)
        back = (1, 2, 0, 3, 4) if part.is_shared else (0, 2, 1, 3, 4)
        tokens = found.permute(back).flatten(0, 1).flatten(1)  # [num_tiles * tile_tokens, ...]
        out.index_copy_(0, part.out_rows, tokens.index_select(0, part.used))

    def _slots(self, span: Span, first_position: int, num_tokens: int) -> npt.NDArray[np.int64]:
        positions = np.arange(first_position, first_position + num_tokens)
        blocks = span.block_table[positions // self._block_size]
        return blocks * self._block_size + positions % self._block_size

    def _batches(self, spans: list[Span]) -> Iterator[list[Span]]:
        """Spans of about one length together, each batch within the bound on values."""
        batch: list[Span] = []
        for span in sorted(spans, key=_num_kv_tiles):
            num_values = (len(batch) + 1) * _num_kv_tiles(span) * KV_TILE_TOKENS
            num_values *= self.num_kv_heads * max(self.head_dim, self.tile_rows)
            if batch and num_values > _MAX_VALUES:
                yield batch
                batch = []
            batch.append(span)
        if batch:
            yield batch

    def _pieces(self, span: Span) -> Iterator[Span]:
        """A long span cut at query tiles, so that each piece's scores stay within the bound."""
        values_per_tile = _num_kv_tiles(span) * KV_TILE_TOKENS * self.num_kv_heads * self.tile_rows
        num_tokens = max(1, _MAX_VALUES // values_per_tile) * self.tile_tokens
        for start in range(0, span.num_tokens, num_tokens):
            yield Span(
                span.first_row + start,
                min(num_tokens, span.num_tokens - start),
                span.first_position + start,
                span.block_table,
            )

    def _plan_batch(self, spans: list[Span]) -> Part:
        num_kv_tiles = max(map(_num_kv_tiles, spans))
        positions = self._row_positions(spans).repeat(self.num_kv_heads, axis=0)
        return self._part(spans, num_kv_tiles, positions, is_shared=False)

    def _plan_chunk(self, span: Span) -> Part:
        return self._part([span], _num_kv_tiles(span), self._row_positions([span]), is_shared=True)

    def _part(
        self,
        spans: list[Span],
        num_kv_tiles: int,
        positions: npt.NDArray[np.int64],
        *,
        is_shared: bool,
    ) -> Part:
        query_rows, used, out_rows = [], [], []
        num_padded = 0
        for span in spans:
            num_rows = -(-span.num_tokens // self.tile_tokens) * self.tile_tokens
            padded = np.full(num_rows, span.first_row)
            own = np.arange(span.first_row, span.first_row + span.num_tokens)
            padded[: span.num_tokens] = own
            query_rows.append(padded)
            out_rows.append(own)
            used.append(np.arange(num_padded, num_padded + span.num_tokens))
            num_padded += num_rows
        seen = np.arange(num_kv_tiles * KV_TILE_TOKENS).reshape(num_kv_tiles, 1, 1, 1, -1)
        num_tiles = num_padded // self.tile_tokens
        kv_heads, num_spans = self.num_kv_heads, len(spans)
        return Part(
            is_shared=is_shared,
            query_rows=torch.from_numpy(np.concatenate(query_rows)),
            used=torch.from_numpy(np.concatenate(used)),
            out_rows=torch.from_numpy(np.concatenate(out_rows)),
            tile_shape=(kv_heads, num_tiles) if is_shared else (1, num_tiles * kv_heads),
            kv_index=torch.from_numpy(self._kv_index(spans, num_kv_tiles)),
            kv_shape=(num_kv_tiles, *((kv_heads, 1) if is_shared else (1, num_spans * kv_heads))),
            hidden=torch.from_numpy(seen > positions[None, None, :, :, None]),
        )

    def _row_positions(self, spans: list[Span]) -> npt.NDArray[np.int64]:
        """Position of every query row, [num_tiles, tile_rows]; padding sees the first token."""
        tiles = []
        for span in spans:
            num_tiles = -(-span.num_tokens // self.tile_tokens)
            tokens = np.zeros(num_tiles * self.tile_tokens, np.int64)
            tokens[: span.num_tokens] = span.first_position + np.arange(span.num_tokens)
            rows = np.zeros((num_tiles, self.tile_rows), np.int64)
            used = tokens.repeat(self.group_size).reshape(num_tiles, -1)
            rows[:, : used.shape[1]] = used
            tiles.append(rows)
        return np.concatenate(tiles)

    def _kv_index(self, spans: list[Span], num_kv_tiles: int) -> npt.NDArray[np.int64]:
        """Rows of the flattened cache, in the order [kv tile, span, KV head, token]."""
        slots = np.full((len(spans), num_kv_tiles * KV_TILE_TOKENS), self.num_slots)
        for row, span in zip(slots, spans, strict=True):
            num_seen = span.first_position + span.num_tokens
            row[:num_seen] = self._slots(span, 0, num_seen)
        tiles = slots.reshape(len(spans), num_kv_tiles, 1, KV_TILE_TOKENS).transpose(1, 0, 2, 3)
        heads = np.arange(self.num_kv_heads).reshape(1, 1, -1, 1) * (self.num_slots + 1)
        return np.ravel(tiles + heads)


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens that are computed together; see `kernels.attention.attend_tiles` for the shapes.

    `query_rows` picks the step's rows that fill the tiles (padding repeats a row of the same
    sequence), `used` the tile tokens that are not padding, `out_rows` the rows they belong to.
    """

    is_shared: bool
    query_rows: Tensor  # [num_tiles * tile_tokens]
    used: Tensor  # [num_tokens]
    out_rows: Tensor  # [num_tokens]
    tile_shape: tuple[int, int]
    kv_index: Tensor  # [num_kv_tiles * num_spans * num_kv_heads * KV_TILE_TOKENS]
    kv_shape: tuple[int, int, int]
    hidden: Tensor  # bool [num_kv_tiles, 1, num_tiles, tile_rows, KV_TILE_TOKENS]


class PagedStep:
    """A `StepAttention` of `PagedAttention`."""

    def __init__(self, backend: PagedAttention, slot_mapping: Tensor, parts: list[Part]) -> None:
        self._backend = backend
        self._slot_mapping = slot_mapping
        self._parts = parts

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `StepAttention.attend`."""
        self._backend.write(layer, key, value, self._slot_mapping)
        scaled = query * self._backend.head_dim**-0.5
        out = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
        for part in self._parts:
            self._backend.attend(layer, scaled, part, out)
        return out


def _num_kv_tiles(span: Span) -> int:
    return -(-(span.first_position + span.num_tokens) // KV_TILE_TOKENS)
