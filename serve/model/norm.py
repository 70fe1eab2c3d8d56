"""RMSNorm, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from serve.catalog import ModelShape
from serve.kernels.elementwise import rms_norm

from .tensor_destination import TensorDestination
from .weights import Cut, whole


class RMSNorm:
    """Root-mean-square norm with a float32 weight."""

    def __init__(self, shape: ModelShape) -> None:
        self.weight = torch.empty(shape.hidden)
        self._eps = shape.rms_norm_eps

    def cuts(self, name: str) -> Iterator[Cut]:
        """All of `name`.weight."""
        yield whole(f"{name}.weight", TensorDestination(self.weight))

    def __call__(self, x: Tensor) -> Tensor:
        """Normed rows of `x` [num_tokens, hidden]."""
        return rms_norm(x, self.weight, self._eps)
