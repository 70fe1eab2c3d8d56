"""Cuts a step's spans into query tiles and finds the slots that each tile reads.

Index arithmetic in numpy, once a step; the layers reuse it. The one decision behind it: a query
tile holds as many tokens of one sequence as fit `TILE_ROWS` rows when each brings all query heads
of a KV head. Sequences of one tile (decodes) are computed together; one of several (a prefill
chunk) alone, its KV gathered once for all its tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.kernels.attention import KV_TILE_TOKENS
from serve.kernels.linear import TILE_ROWS

from .protocol import Span

# Most values of a gathered key tensor or of the scores at once (32 MiB of float32).
_MAX_VALUES = 1 << 23

_Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens that are computed together; shapes as `kernels.attention.attend_tiles` wants them.

    `query_rows` are the step's rows that fill the tiles, padding repeating a row of the same
    sequence; `used` are the tile tokens that are not padding and `out_rows` their rows. Where
    `is_shared`, groups are KV heads and the tiles of one sequence share its KV; otherwise there is
    one group, of one tile for each sequence and KV head.
    """

    is_shared: bool
    num_tile_tokens: int
    query_rows: Tensor  # [num_tiles * num_tile_tokens]
    used: Tensor  # [num_tokens]
    out_rows: Tensor  # [num_tokens]
    kv_index: Tensor  # [num_kv_tiles * num_sequences * num_kv_heads * KV_TILE_TOKENS]
    num_kv_tiles: int
    hidden: Tensor  # bool [num_kv_tiles, 1, num_tiles (* num_kv_heads), used rows, KV_TILE_TOKENS]


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one rank's heads and blocks are cut.

    `group_size` query heads share a KV head. Slot `num_slots`, behind the last block, is the
    padding slot.
    """

    num_kv_heads: int
    group_size: int
    head_dim: int
    block_size: int
    num_slots: int

    @property
    def max_tile_tokens(self) -> int:
        """Tokens of a full query tile."""
        return max(1, TILE_ROWS // self.group_size)

    @property
    def num_tile_rows(self) -> int:
        """Rows of a query tile, padding included."""
        return -(-self.max_tile_tokens * self.group_size // TILE_ROWS) * TILE_ROWS

    def slot_mapping(self, spans: Sequence[Span]) -> Tensor:
        """The slot of each row of the step, int64 [num_tokens]."""
        slots = np.empty(sum(span.num_tokens for span in spans), np.int64)
        for span in spans:
            rows = slice(span.first_row, span.first_row + span.num_tokens)
            slots[rows] = self._slots(span, span.first_position)
        return torch.from_numpy(slots)

    def cut(self, spans: Sequence[Span]) -> list[Part]:
        """Parts that cover every row of the spans once."""
        decodes = [span for span in spans if span.num_tokens == 1]
        short = [span for span in spans if 1 < span.num_tokens <= self.max_tile_tokens]
        chunks = [span for span in spans if span.num_tokens > self.max_tile_tokens]
        parts = [self._part(batch) for some in (decodes, short) for batch in self._batches(some)]
        parts += [self._part([piece]) for chunk in chunks for piece in self._pieces(chunk)]
        return parts

    def _batches(self, spans: list[Span]) -> Iterator[list[Span]]:
        """Sequences of one tile, those of about one length together, within the bound."""
        batch: list[Span] = []
        for span in sorted(spans, key=_num_kv_tiles):
            num_values = (len(batch) + 1) * self._num_values(span) * self.num_kv_heads
            if batch and num_values > _MAX_VALUES:
                yield batch
                batch = []
            batch.append(span)
        if batch:
            yield batch

    def _pieces(self, span: Span) -> Iterator[Span]:
        """A chunk cut between query tiles, within the bound."""
        num_tiles = max(1, _MAX_VALUES // (self._num_values(span) * self.num_kv_heads))
        num_tokens = num_tiles * self.max_tile_tokens
        for start in range(0, span.num_tokens, num_tokens):
            yield Span(
                span.first_row + start,
                min(num_tokens, span.num_tokens - start),
                span.first_position + start,
                span.block_table,
            )

    def _num_values(self, span: Span) -> int:
        """The larger of a tile's scores and one KV head's keys."""
        return _num_kv_tiles(span) * KV_TILE_TOKENS * max(self.head_dim, self.num_tile_rows)

    def _part(self, spans: list[Span]) -> Part:
        num_tile_tokens = min(max(span.num_tokens for span in spans), self.max_tile_tokens)
        num_kv_tiles = max(map(_num_kv_tiles, spans))
        is_shared = spans[0].num_tokens > num_tile_tokens
        rows, positions = zip(*(_fill(span, num_tile_tokens) for span in spans), strict=True)
        query_rows, query_positions = np.concatenate(rows), np.concatenate(positions)
        used = np.flatnonzero(query_positions >= 0)
        row_positions = query_positions.clip(min=0).repeat(self.group_size)
        seen_by = row_positions.reshape(-1, num_tile_tokens * self.group_size)
        if not is_shared:
            seen_by = seen_by.repeat(self.num_kv_heads, axis=0)
        tokens = np.arange(num_kv_tiles * KV_TILE_TOKENS).reshape(num_kv_tiles, 1, 1, 1, -1)
        return Part(
            is_shared=is_shared,
            num_tile_tokens=num_tile_tokens,
            query_rows=torch.from_numpy(query_rows),
            used=torch.from_numpy(used),
            out_rows=torch.from_numpy(query_rows[used]),
            kv_index=torch.from_numpy(self._kv_index(spans, num_kv_tiles)),
            num_kv_tiles=num_kv_tiles,
            hidden=torch.from_numpy(tokens > seen_by[None, None, :, :, None]),
        )

    def _kv_index(self, spans: list[Span], num_kv_tiles: int) -> _Ids:
        """Rows of the cache with heads and slots flattened: [kv tile, sequence, KV head, token]."""
        slots = np.full((len(spans), num_kv_tiles * KV_TILE_TOKENS), self.num_slots)
        for row, span in zip(slots, spans, strict=True):
            row[: span.first_position + span.num_tokens] = self._slots(span, 0)
        tiles = slots.reshape(len(spans), num_kv_tiles, 1, KV_TILE_TOKENS).swapaxes(0, 1)
        heads = np.arange(self.num_kv_heads).reshape(-1, 1) * (self.num_slots + 1)
        return np.ravel(tiles + heads)

    def _slots(self, span: Span, first_position: int) -> _Ids:
        """Slots of the span's positions from `first_position` to its end."""
        positions = np.arange(first_position, span.first_position + span.num_tokens)
        blocks = span.block_table[positions // self.block_size]
        slots: _Ids = blocks * self.block_size + positions % self.block_size
        return slots


def _fill(span: Span, num_tile_tokens: int) -> tuple[_Ids, _Ids]:
    """Row and position of every token of the span's tiles; padding has position -1."""
    num_padding = -span.num_tokens % num_tile_tokens
    rows = np.arange(span.first_row, span.first_row + span.num_tokens)
    positions = np.arange(span.first_position, span.first_position + span.num_tokens)
    return (
        np.pad(rows, (0, num_padding), constant_values=span.first_row),
        np.pad(positions, (0, num_padding), constant_values=-1),
    )


def _num_kv_tiles(span: Span) -> int:
    return -(-(span.first_position + span.num_tokens) // KV_TILE_TOKENS)
