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
    between all its query tiles where `keys` has one tile in the place of `num_tiles`. Rows of a
    tile behind `num_used_rows` are padding.

    Args:
        query: float32 [num_groups, num_tiles, num_rows, head_dim].
        keys: float32 [num_kv_tiles, num_groups, num_tiles or 1, KV_TILE_TOKENS, head_dim].
        values: the same.
        hidden: bool, broadcastable to [num_kv_tiles, num_groups, num_tiles, num_used_rows,
            KV_TILE_TOKENS]; True where the query must not see the token.

    Returns:
        float32 [num_groups, num_tiles, num_used_rows, head_dim].
    """
    num_kv_tiles, num_used_rows = keys.shape[0], hidden.shape[-2]
    queries = query.expand(num_kv_tiles, *query.shape)
    products = _multiply(queries, keys.transpose(-1, -2))
    scores = products[..., :num_used_rows, :].masked_fill_(hidden, -torch.inf)
    scores.sub_(scores.amax(-1, keepdim=True).amax(0, keepdim=True)).exp_()
    totals = scores.sum(-1, keepdim=True)
    parts = _multiply(products, values)[..., :num_used_rows, :]
    total, out = totals[0], parts[0]
    for tile in range(1, num_kv_tiles):
        total += totals[tile]
        out += parts[tile]
    return out / total


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Tile products [num_kv_tiles, num_groups, num_tiles, ...]; `right` may have one tile."""
    num_kv_tiles, num_groups, num_tiles, num_rows, _ = left.shape
    out = left.new_empty(num_kv_tiles, num_groups, num_tiles, num_rows, right.shape[-1])
    if right.shape[2] == num_tiles:
        torch.bmm(left.flatten(0, 2), right.flatten(0, 2), out=out.view(-1, *out.shape[3:]))
        return out
    for tile in range(num_kv_tiles):
        for group in range(num_groups):
            shared = right[tile, group].expand(num_tiles, -1, -1)
            torch.bmm(left[tile, group], shared, out=out[tile, group])
    return out
