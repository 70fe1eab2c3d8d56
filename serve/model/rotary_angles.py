"""Cosines and sines of the rotary position embedding, YaRN included, computed once at load.

Not where they are applied. The one decision behind it: angles are float32, step by step as in
transformers, for checkpoints were trained and are checked with exactly these; powers, cosines and
sines of them are rounded once, from float64, so that no library's own approximation shows.
"""

from __future__ import annotations

import math

import numpy as np

from serve.catalog import ModelShape, Yarn
from serve.kernels.dtypes import Floats

_NUM_ROWS = 1024  # of positions at a time: float64 in between stays small


def rotary_angles(shape: ModelShape, num_positions: int) -> tuple[Floats, Floats]:
    """Cosine and sine of positions [0, num_positions), float32 [num_positions, head_dim / 2]."""
    frequencies = _frequencies(shape)
    scale = np.float32(shape.yarn.attention_factor if shape.yarn is not None else 1.0)
    cos = np.empty((num_positions, len(frequencies)), np.float32)
    sin = np.empty_like(cos)
    for start in range(0, num_positions, _NUM_ROWS):
        rows = slice(start, min(start + _NUM_ROWS, num_positions))
        positions = np.arange(rows.start, rows.stop, dtype=np.float32)
        angles = (positions[:, None] * frequencies).astype(np.float64)
        cos[rows], sin[rows] = np.cos(angles), np.sin(angles)
    cos *= scale
    sin *= scale
    return cos, sin


def _frequencies(shape: ModelShape) -> Floats:
    one = np.float32(1.0)
    exponents = np.arange(0, shape.head_dim, 2, dtype=np.float32) / np.float32(shape.head_dim)
    wavelengths = (shape.rope_theta ** exponents.astype(np.float64)).astype(np.float32)
    if shape.yarn is None:
        return one / wavelengths
    kept = one - _interpolated_share(shape, shape.yarn)
    factor = np.float32(shape.yarn.factor)
    return one / (factor * wavelengths) * (one - kept) + one / wavelengths * kept


def _interpolated_share(shape: ModelShape, yarn: Yarn) -> Floats:
    """How much of each dimension is interpolated: a ramp from 0 to 1 (YaRN, section 3.2)."""

    def dimension(num_rotations: float) -> float:
        turns = yarn.original_max_positions / (num_rotations * 2 * math.pi)
        return shape.head_dim * math.log(turns) / (2 * math.log(shape.rope_theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, shape.head_dim - 1)
    width = high - low or 0.001
    dimensions = np.arange(shape.head_dim // 2, dtype=np.float32)
    ramp: Floats = (dimensions - np.float32(low)) / np.float32(width)
    return ramp.clip(0.0, 1.0)
