"""Matrix product whose rows do not know their neighbours.

Not fast: the torch reference that faster kernels are held against. A BLAS chooses its order of
summation by the number of rows (one row is another routine than sixteen) and by alignment, so the
same token would get other bits alone than in a batch. The one decision behind it: every product has
exactly `TILE_ROWS` rows, the last tile filled up with zeros, and starts at a cache line, so that
every row of every batch goes through the same routine. Sums run in float32; bfloat16 weights are
widened panel by panel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_ROWS = 16

# Inner and outer sizes are multiples of this, filled up with zeros where the weight's are not: at a
# ragged edge (outputs below 12, an odd number of inputs) a row's bits depend on its place.
EDGE = 16

_ALIGNMENT_BYTES = 64

# Widened panels of bfloat16 weights hold about this many values (4 MiB), whatever the batch.
_PANEL_VALUES = 1 << 20


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`.

    A weight whose sizes are not multiples of `EDGE` is copied on every call.

    Args:
        x: float32 [num_tokens, num_inputs].
        weight: float32 or bfloat16 [num_outputs, num_inputs].
        bias: float32 [num_outputs].

    Returns:
        float32 [num_tokens, num_outputs].
    """
    (num_tokens, num_inputs), num_outputs = x.shape, weight.shape[0]
    if num_inputs % EDGE or num_outputs % EDGE:
        weight = _pad(weight, (-(-num_outputs // EDGE) * EDGE, -(-num_inputs // EDGE) * EDGE))
    rows = _pad(x, (-(-num_tokens // TILE_ROWS) * TILE_ROWS, weight.shape[1]))
    if weight.dtype == torch.float32:
        out = _multiply(rows, weight)
    else:
        out = torch.cat([_multiply(rows, panel) for panel in _panels(weight)], dim=-1)
    result = out[:num_tokens, :num_outputs]
    return result if bias is None else result.add_(bias)


def _panels(weight: Tensor) -> Iterator[Tensor]:
    """Rows of a weight, widened, in groups whose size the weight's shape alone decides."""
    num_rows = max(EDGE, _PANEL_VALUES // weight.shape[1] // EDGE * EDGE)
    for panel in torch.split(weight, num_rows):
        yield panel.float()


def _pad(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """`x` with zeros up to `shape`, contiguous from a cache line on; itself where it is so."""
    if x.shape == shape and x.is_contiguous() and x.data_ptr() % _ALIGNMENT_BYTES == 0:
        return x
    padded = x.new_zeros(shape)
    padded[: x.shape[0], : x.shape[1]] = x
    return padded


def _multiply(rows: Tensor, weight: Tensor) -> Tensor:
    """Each tile of `rows` times the transposed weight."""
    transposed = weight.t()
    if rows.shape[0] == TILE_ROWS:
        return torch.mm(rows, transposed)
    out = rows.new_empty(rows.shape[0], weight.shape[0])
    for start in range(0, rows.shape[0], TILE_ROWS):
        end = start + TILE_ROWS
        torch.mm(rows[start:end], transposed, out=out[start:end])
    return out
