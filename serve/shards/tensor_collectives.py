"""What every way for ranks to meet has in common: tensors of any type over rows of float32.

Not a transport: a subclass moves flat float32 values (`.collectives` over sockets, `.shared_memory`
through memory). The one decision behind it: values are summed in float32 and rounded to the
tensor's type once. Ranks that compute in the native kernels never import torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from serve.kernels.dtypes import Floats

if TYPE_CHECKING:
    from torch import Tensor


class TensorCollectives(ABC):
    """The tensor half of a `serve.model.tensor_parallel.Collectives`."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of every rank's `x` in rank order, in float32; returned in the dtype of `x`."""
        import torch

        total = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        self._all_reduce(total.numpy().reshape(-1))
        return total.to(x.dtype)

    def gather_last_dim(self, x: Tensor) -> Tensor | None:
        """On rank 0 every rank's `x`, concatenated along the last dimension; elsewhere None."""
        import torch

        mine = x.to(torch.float32).contiguous().numpy().reshape(-1)
        if self.rank > 0:
            self._gather(mine, None)
            return None
        parts = torch.empty((self.size, *x.shape))
        self._gather(mine, parts.numpy().reshape(self.size, -1))
        return torch.cat(list(parts), dim=-1).to(x.dtype)

    def numbers(self, number: int) -> list[int]:
        """What each rank gave as `number`, on every rank; exact below 2**24."""
        numbers = np.zeros(self.size, np.float32)
        numbers[self.rank] = number
        self._all_reduce(numbers)
        return [int(found) for found in numbers]

    @abstractmethod
    def _all_reduce(self, values: Floats) -> None:
        """`values` [n] becomes the sum over ranks, in rank order."""

    @abstractmethod
    def _gather(self, values: Floats, out: Floats | None) -> None:
        """On rank 0 row r of `out` [size, n] becomes rank r's `values` [n]; None elsewhere."""
