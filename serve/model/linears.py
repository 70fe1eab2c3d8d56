"""The linear layers of a decoder, each split over the ranks in its own way.

Column-parallel layers (QKV, gate-up) split their outputs and need no communication; row-parallel
ones (attention output, down) split their inputs and end in an all-reduce (Shoeybi et al., 2019).
Weights keep their dtype; biases and all arithmetic are float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from serve.catalog import ModelShape, num_shard_kv_heads
from serve.kernels.linear import linear

from .tensor_parallel import Collectives
from .weights import Cut, TensorDestination


class QKVLinear:
    """Query, key and value projections of this rank's heads as one product, with bias.

    Where ranks outnumber the KV heads, neighbouring ranks hold copies of the same one.
    """

    def __init__(self, shape: ModelShape, collectives: Collectives, *, dtype: torch.dtype) -> None:
        rank, size = collectives.rank, collectives.size
        self.num_heads = shape.num_heads // size
        self.num_kv_heads = num_shard_kv_heads(shape, size)
        q_size = self.num_heads * shape.head_dim
        kv_size = self.num_kv_heads * shape.head_dim
        q_start = rank * q_size
        kv_start = rank * shape.num_kv_heads // size * shape.head_dim
        self._splits = [q_size, kv_size, kv_size]
        self._starts = [q_start, kv_start, kv_start]
        self._head_dim = shape.head_dim
        self.weight = torch.empty(q_size + 2 * kv_size, shape.hidden, dtype=dtype)
        self.bias = torch.empty(q_size + 2 * kv_size)

    def cuts(self, prefix: str) -> Iterator[Cut]:
        """This rank's rows of `prefix`.{q,k,v}_proj."""
        parts = zip("qkv", self._starts, torch.split(self.weight, self._splits),
                    torch.split(self.bias, self._splits), strict=True)  # fmt: skip
        for letter, start, weight, bias in parts:
            rows = (start, start + weight.shape[0])
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
        self._size = shape.ffn // collectives.size
        self._start = collectives.rank * self._size
        self.weight = torch.empty(2 * self._size, shape.hidden, dtype=dtype)

    def cuts(self, prefix: str) -> Iterator[Cut]:
        """This rank's rows of `prefix`.gate_proj and .up_proj."""
        rows = (self._start, self._start + self._size)
        for name, weight in zip(("gate", "up"), self.weight.chunk(2), strict=True):
            yield Cut(
                f"{prefix}.{name}_proj.weight",
                (rows, (0, weight.shape[1])),
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
