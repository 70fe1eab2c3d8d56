"""Cosines and sines of the rotary position embedding, YaRN included, computed once at load.

The arithmetic follows transformers step by step in float32, for its checkpoints were trained and
are checked with exactly these angles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from serve.catalog import ModelShape, Yarn


class RotaryTable:
    """Angles of positions [0, num_positions)."""

    def __init__(self, shape: ModelShape, num_positions: int) -> None:
        cos, sin = rotary_angles(shape, num_positions)
        self._cos = torch.cat((cos, cos), dim=-1)  # [num_positions, head_dim]
        self._sin = torch.cat((-sin, sin), dim=-1)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What `kernels.elementwise.rotate` wants for `positions` [num_tokens]: cosine, sine."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)


def rotary_angles(shape: ModelShape, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of positions [0, num_positions), float32 [num_positions, head_dim / 2]."""
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * _frequencies(shape)
    scale = shape.yarn.attention_factor if shape.yarn is not None else 1.0
    return angles.cos().mul_(scale), angles.sin().mul_(scale)


def _frequencies(shape: ModelShape) -> Tensor:
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    wavelengths = shape.rope_theta**exponents
    if shape.yarn is None:
        return 1.0 / wavelengths
    kept = 1.0 - _interpolated_share(shape, shape.yarn)
    return 1.0 / (shape.yarn.factor * wavelengths) * (1.0 - kept) + 1.0 / wavelengths * kept


def _interpolated_share(shape: ModelShape, yarn: Yarn) -> Tensor:
    """How much of each dimension is interpolated: a ramp from 0 to 1 (YaRN, section 3.2)."""

    def dimension(num_rotations: float) -> float:
        turns = yarn.original_max_positions / (num_rotations * 2 * math.pi)
        return shape.head_dim * math.log(turns) / (2 * math.log(shape.rope_theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, shape.head_dim - 1)
    width = high - low or 0.001
    ramp = (torch.arange(shape.head_dim // 2, dtype=torch.float32) - low) / width
    return ramp.clamp(0.0, 1.0)
