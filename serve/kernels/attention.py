"""Attention of query tiles over fixed KV tiles, in float32.

Not aware of blocks, sequences or layers: `serve.attention` gathers for it. The one decision behind
it: every product has the shape [query rows of a tile, head_dim] x [head_dim, KV_TILE_TOKENS] (and
back), so a query's bits depend neither on the other queries nor on how much padding follows its
context: a tile that a query may not see adds exactly zero to its sums, in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

KV_TILE_TOKENS = 128


def attend_tiles(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
    """Softmax attention; `query` is already scaled.

    The first KV tile holds at least one visible token for every query row. A group shares its KV
    between all its query tiles where `keys` has one tile in the place of `num_tiles`.

    Args:
        query: float32 [num_groups, num_tiles, num_rows, head_dim].
        keys: float32 [num_kv_tiles, num_groups, num_tiles or 1, KV_TILE_TOKENS, head_dim].
        values: the same.
        hidden: bool, broadcastable to [num_kv_tiles, num_groups, num_tiles, num_rows,
            KV_TILE_TOKENS]; True where the query must not see the token.

    Returns:
        float32 [num_groups, num_tiles, num_rows, head_dim].
    """
    num_kv_tiles = keys.shape[0]
    num_groups, num_tiles, num_rows, _ = query.shape
    scores = query.new_empty(num_kv_tiles, num_groups, num_tiles, num_rows, KV_TILE_TOKENS)
    for tile in range(num_kv_tiles):
        for group in range(num_groups):
            tile_keys = keys[tile, group].transpose(1, 2).expand(num_tiles, -1, -1)
            torch.bmm(query[group], tile_keys, out=scores[tile, group])
    scores.masked_fill_(hidden, -torch.inf)
    scores.sub_(scores.amax(-1, keepdim=True).amax(0, keepdim=True)).exp_()
    totals = scores.sum(-1, keepdim=True)
    total, out = totals[0], torch.empty_like(query)
    for group in range(num_groups):
        _weigh(scores[:, group], values[:, group], out[group])
    for tile in range(1, num_kv_tiles):
        total = total + totals[tile]
    return out.div_(total)


def _weigh(weights: Tensor, values: Tensor, out: Tensor) -> None:
    """Sum of `weights[i] @ values[i]` over KV tiles i, in their order, into `out`."""
    num_tiles = out.shape[0]
    torch.bmm(weights[0], values[0].expand(num_tiles, -1, -1), out=out)
    for tile in range(1, weights.shape[0]):
        out += torch.bmm(weights[tile], values[tile].expand(num_tiles, -1, -1))
