"""The linear layers of a decoder, each split over the ranks in its own way.

Column-parallel layers (QKV, gate-up) split their outputs and need no communication; row-parallel
ones (attention output, down) split their inputs and end in an all-reduce (Shoeybi et al., 2019).
Weights keep their dtype; biases and all arithmetic are float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from serve.catalog import ModelShape
from serve.kernels.linear import linear

from .rank_ranges import RankRanges
from .tensor_destination import TensorDestination
from .tensor_parallel import Collectives
from .weights import Cut


class QKVLinear:
    """Query, key and value projections of this rank's heads as one product, with bias.

    Where ranks outnumber the KV heads, neighbouring ranks hold copies of the same one.
    """

    def __init__(self, shape: ModelShape, collectives: Collectives, *, dtype: torch.dtype) -> None:
        ranges = RankRanges.of(shape, rank=collectives.rank, size=collectives.size)
        self.num_heads = ranges.num_heads
        self.num_kv_heads = ranges.num_kv_heads
        self._ranges = [ranges.query, ranges.key_value, ranges.key_value]
        self._splits = [end - start for start, end in self._ranges]
        self._head_dim = shape.head_dim
        self.weight = torch.empty(sum(self._splits), shape.hidden, dtype=dtype)
        self.bias = torch.empty(sum(self._splits))

    def cuts(self, prefix: str) -> Iterator[Cut]:
        """This rank's rows of `prefix`.{q,k,v}_proj."""
        parts = zip("qkv", self._ranges, torch.split(self.weight, self._splits),
                    torch.split(self.bias, self._splits), strict=True)  # fmt: skip
        for letter, rows, weight, bias in parts:
            yield Cut(
                f"{prefix}.{letter}_proj.weight",
                (rows, (0, weight.shape[1])),
                TensorDestination(weight),
            )
            yield Cut(f"{prefix}.{letter}_proj.bias", (rows,), TensorDestination(bias))

    def __call__(self, x: Tensor) -> Tensor:
        """Query heads, key heads, value heads: [num_tokens, heads of all three, head_dim]."""
        return linear(x, self.weight, self.bias).view(x.shape[0], -1, self._head_dim)


class GateUpLinear:
    """Gate and up projections of this rank's part of the FFN as one product."""

    def __init__(self, shape: ModelShape, collectives: Collectives, *, dtype: torch.dtype) -> None:
        ranges = RankRanges.of(shape, rank=collectives.rank, size=collectives.size)
        self._rows = ranges.ffn
        size = self._rows[1] - self._rows[0]
        self.weight = torch.empty(2 * size, shape.hidden, dtype=dtype)

    def cuts(self, prefix: str) -> Iterator[Cut]:
        """This rank's rows of `prefix`.gate_proj and .up_proj."""
        for name, weight in zip(("gate", "up"), self.weight.chunk(2), strict=True):
            yield Cut(
                f"{prefix}.{name}_proj.weight",
                (self._rows, (0, weight.shape[1])),
                TensorDestination(weight),
            )

    def __call__(self, x: Tensor) -> Tensor:
        """[num_tokens, 2 * this rank's FFN size], gate first."""
        return linear(x, self.weight)


class RowLinear:
    """A projection whose inputs are split over the ranks and whose outputs are summed."""

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        *,
        collectives: Collectives,
        dtype: torch.dtype,
    ) -> None:
        size = num_inputs // collectives.size
        self._columns = (collectives.rank * size, (collectives.rank + 1) * size)
        self._collectives = collectives
        self.weight = torch.empty(num_outputs, size, dtype=dtype)

    def cuts(self, name: str) -> Iterator[Cut]:
        """This rank's columns of `name`.weight."""
        yield Cut(
            f"{name}.weight",
            ((0, self.weight.shape[0]), self._columns),
            TensorDestination(self.weight),
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Summed over the ranks, [num_tokens, num_outputs]."""
        return self._collectives.all_reduce(linear(x, self.weight))
