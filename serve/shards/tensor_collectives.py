"""What every way for ranks to meet has in common: tensors of any type over rows of float32.

Not a transport: a subclass moves flat float32 values (`.collectives` over sockets, `.shared_memory`
through memory). The one decision behind it: values are summed in float32 and rounded to the
tensor's type once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]


class TensorCollectives(ABC):
    """The tensor half of a `serve.model.tensor_parallel.Collectives`."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of every rank's `x` in rank order, in float32; returned in the dtype of `x`."""
        total = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        self._all_reduce(total.numpy().reshape(-1))
        return total.to(x.dtype)

    def gather_last_dim(self, x: Tensor) -> Tensor | None:
        """On rank 0 every rank's `x`, concatenated along the last dimension; elsewhere None."""
        mine = x.to(torch.float32).contiguous().numpy().reshape(-1)
        if self.rank > 0:
            self._gather(mine, None)
            return None
        parts = torch.empty((self.size, *x.shape))
        self._gather(mine, parts.numpy().reshape(self.size, -1))
        return torch.cat(list(parts), dim=-1).to(x.dtype)

    @abstractmethod
    def _all_reduce(self, values: Floats) -> None:
        """`values` [n] becomes the sum over ranks, in rank order."""

    @abstractmethod
    def _gather(self, values: Floats, out: Floats | None) -> None:
        """On rank 0 row r of `out` [size, n] becomes rank r's `values` [n]; None elsewhere."""
