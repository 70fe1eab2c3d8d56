"""Matrix product whose rows do not know their neighbours.

Not fast: the torch reference that faster kernels are held against. A BLAS chooses its order of
summation by the number of rows (one row is another routine than sixteen), so the same token would
get other bits alone than in a batch. The one decision behind it: every product has exactly
`TILE_ROWS` rows, the last tile filled up with zeros, so that every row of every batch goes through
the same routine. Sums run in float32; bfloat16 weights are widened panel by panel.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_ROWS = 16

# Widened panels of bfloat16 weights hold this many values (4 MiB), whatever the batch.
_PANEL_VALUES = 1 << 20


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`.

    Args:
        x: float32 [num_tokens, num_inputs].
        weight: float32 or bfloat16 [num_outputs, num_inputs].
        bias: float32 [num_outputs].

    Returns:
        float32 [num_tokens, num_outputs], contiguous.
    """
    num_tokens, (num_outputs, num_inputs) = x.shape[0], weight.shape
    tiles = pad_rows(x).view(-1, TILE_ROWS, num_inputs)
    out = x.new_empty(tiles.shape[0], TILE_ROWS, num_outputs)
    if weight.dtype == torch.float32:
        _multiply(tiles, weight, out)
    else:
        num_columns = max(TILE_ROWS, _PANEL_VALUES // num_inputs)
        for start in range(0, num_outputs, num_columns):
            panel = weight[start : start + num_columns].float()
            out[:, :, start : start + num_columns] = _multiply(
                tiles, panel, out.new_empty(tiles.shape[0], TILE_ROWS, panel.shape[0])
            )
    result = out.flatten(0, 1)[:num_tokens]
    return result if bias is None else result.add_(bias)


def pad_rows(x: Tensor, multiple: int = TILE_ROWS) -> Tensor:
    """`x` with zero rows appended up to a multiple of `multiple`; itself where none is needed."""
    num_missing = -x.shape[0] % multiple
    if num_missing == 0:
        return x.contiguous()
    padded = x.new_zeros(x.shape[0] + num_missing, *x.shape[1:])
    padded[: x.shape[0]] = x
    return padded


def _multiply(tiles: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    transposed = weight.t()
    for tile, tile_out in zip(tiles.unbind(), out.unbind(), strict=True):
        torch.mm(tile, transposed, out=tile_out)
    return out
