"""The rotary position embedding's angles as the torch reference looks them up."""

from __future__ import annotations

import torch
from torch import Tensor

from serve.catalog import ModelShape

from .rotary_angles import rotary_angles


class RotaryTable:
    """Angles of positions [0, num_positions)."""

    def __init__(self, shape: ModelShape, num_positions: int) -> None:
        cos, sin = map(torch.from_numpy, rotary_angles(shape, num_positions))
        self._cos = torch.cat((cos, cos), dim=-1)  # [num_positions, head_dim]
        self._sin = torch.cat((-sin, sin), dim=-1)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What `kernels.elementwise.rotate` wants for `positions` [num_tokens]: cosine, sine."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)
