"""Torch tensors as what weights are loaded into: the reference's and a GPU's.

Not the reading (`.weights`), which knows no torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve.kernels.dtypes import Stored


class TensorDestination:
    """A torch tensor on any device, as a destination; converts to its dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tuple(tensor.shape)
        self.num_bytes = tensor.nbytes
        self._tensor = tensor

    def fill(self, source: Stored, first_row: int) -> bool:
        """See `Destination.fill`."""
        rows = self._tensor[first_row : first_row + len(source)]
        rows.copy_(as_tensor(source))
        return bool(torch.isfinite(rows).all())


def as_tensor(values: Stored) -> Tensor:
    """The same memory as a float32, float16 or bfloat16 tensor."""
    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
