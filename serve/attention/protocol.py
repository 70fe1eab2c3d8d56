"""What the model and the runner need of attention, whatever computes it.

The runner describes a step's batch as spans; `AttentionBackend.plan` turns them into whatever the
backend wants computed once a step; each layer then calls `StepAttention.attend`. The KV cache lives
in the backend's tensors: a slot is block_id * block_size + offset, on every layer the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's tokens in a batch: rows [first_row, + num_tokens) of the step's tensors.

    They stand at positions [first_position, + num_tokens) and see positions up to their own;
    `block_table` (int64) covers at least first_position + num_tokens slots.
    """

    first_row: int
    num_tokens: int
    first_position: int
    block_table: npt.NDArray[np.int64]


class StepAttention(Protocol):
    """Attention of one planned step."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write the step's keys and values to their slots, then attend.

        Args:
            layer: index of the layer.
            query: float32 [num_tokens, num_heads, head_dim], rotated, not scaled.
            key: float32 [num_tokens, num_kv_heads, head_dim], rotated.
            value: the same shape as `key`.

        Returns:
            float32 [num_tokens, num_heads * head_dim].
        """
        ...


class AttentionBackend(Protocol):
    """Owner of the KV cache's layout."""

    def plan(self, spans: Sequence[Span]) -> StepAttention:
        """Prepare a step whose rows are covered exactly once by `spans`."""
        ...
