"""Norm, activation and rotation: everything between two matrix products.

The one decision behind it: only operations that round each value by itself. torch's fused kernels
(`silu`, `addcmul`) use one formula in the vector body and another for the elements left over, so a
value's bits depend on where it lies; `exp`, `sqrt`, products, sums of two and quotients do not.
Row sums run over one contiguous row each, whose length no batch changes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of each row (Zhang and Sennrich, 2019), scaled by `weight`.

    Args:
        x: float32 [num_tokens, hidden].
        weight: float32 [hidden].
        eps: added to the mean square.
    """
    scale = (x * x).sum(-1, keepdim=True).div_(x.shape[-1]).add_(eps).sqrt_()
    return (x / scale).mul_(weight)


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of [num_tokens, 2 * ffn], where `gate` is the first half of each row."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (gate / gate.neg().exp_().add_(1.0)).mul_(up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., 2021), halves layout.

    Args:
        x: float32 [num_tokens, num_heads, head_dim].
        cos: float32 [num_tokens, 1, head_dim], already gathered by position.
        sin: the same, its first half negated.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1).mul_(sin).add_(x * cos)
