"""Norm, activation and rotation equal torch's, and a row's bits do not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serve.kernels.elementwise import rms_norm, rotate, silu_and_multiply


def _norm(x: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 1.5, x.shape[1])
    return rms_norm(x, weight, 1e-6)


def _rotated(x: Tensor) -> Tensor:
    heads = x.view(x.shape[0], 2, -1)
    angles = torch.linspace(0, 3, heads.shape[-1] // 2)
    cos, sin = angles.cos(), angles.sin()
    return rotate(heads, torch.cat((cos, cos)), torch.cat((-sin, sin))).flatten(1)


@pytest.mark.parametrize("operation", [_norm, silu_and_multiply, _rotated])
@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.integers(1, 70),
    width=st.sampled_from([4, 20, 100, 896, 1216, 2432]),
    num_threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**31),
)
def test_a_row_s_bits_do_not_depend_on_batch_or_threads(
    operation: Callable[[Tensor], Tensor], num_tokens: int, width: int, num_threads: int, seed: int
):
    x = 4 * torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([operation(row) for row in x.split(1)])
        torch.set_num_threads(num_threads)
        together = operation(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, alone)


def test_rms_norm_equals_torch():
    x, weight = torch.randn(5, 96), torch.randn(96)
    expected = torch.nn.functional.rms_norm(x, (96,), weight, 1e-6)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), expected)


def test_silu_and_multiply_equals_torch_also_at_the_ends():
    x = torch.cat((torch.randn(5, 64) * 5, torch.full((1, 64), -200.0), torch.full((1, 64), 200.0)))
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(silu_and_multiply(x), torch.nn.functional.silu(gate) * up)


def test_rotation_keeps_lengths_and_turns_by_the_angle():
    angle = torch.tensor(0.3)
    cos, sin = angle.cos().repeat(2), torch.stack((-angle.sin(), angle.sin()))
    turned = rotate(torch.tensor([[[1.0, 0.0]]]), cos, sin)
    torch.testing.assert_close(turned, torch.tensor([[[angle.cos(), angle.sin()]]]))
