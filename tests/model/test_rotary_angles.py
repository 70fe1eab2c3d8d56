"""The angles of positions are those that transformers' Qwen2 turns by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from serve.checkpoint import inspect_checkpoint
from serve.model.rotary_angles import rotary_angles


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("yarn_factor", [None, 4.0])
def test_angles_are_those_of_transformers_to_the_last_place(
    checkpoint: Callable[..., Path], head_dim: int, yarn_factor: float | None
) -> None:
    path = checkpoint(head_dim=head_dim, max_positions=16_384, yarn_factor=yarn_factor)
    shape = inspect_checkpoint(path).shape
    num_positions = 16_384 if yarn_factor is None else 65_536
    rotary = Qwen2RotaryEmbedding(Qwen2Config.from_pretrained(path))
    tables = rotary(torch.empty(1), torch.arange(num_positions)[None])
    for found, expected in zip(rotary_angles(shape, num_positions), tables, strict=True):
        assert found.dtype == np.float32
        theirs = expected[0, :, : head_dim // 2].numpy()
        # One place of a frequency is one place of each angle, which grows with the position.
        limits = 2.4e-7 + 1.2e-7 * np.arange(num_positions)[:, None] * _turns(found.shape[1])
        assert (np.abs(found - theirs) <= limits).all()
        # torch's power may be a place beside ours in one frequency or two, as its CPU has it;
        # angles in float64 would leave six tenths alike.
        assert (np.abs(found - theirs) <= 1.3e-7).mean() > 0.8


def _turns(num_frequencies: int) -> np.ndarray:
    """About the radians that each dimension turns in one position."""
    return 1e6 ** (-np.arange(num_frequencies) / num_frequencies)
