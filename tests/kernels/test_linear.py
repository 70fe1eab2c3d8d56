"""A row of a product has the same bits in any batch, at any place, with any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serve.kernels.linear import TILE_ROWS, linear

# (inputs, outputs) with odd sizes, the demo's and the family's slices, deep and narrow ones
SHAPES = [(33, 7), (129, 66), (64, 48), (256, 384), (448, 96), (896, 1152), (2432, 64), (4864, 128)]


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def _case(seed: int, num_inputs: int, num_outputs: int, dtype: torch.dtype, *, num_tokens: int):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, num_inputs, generator=generator)
    weight = torch.randn(num_outputs, num_inputs, generator=generator).to(dtype)
    return x, weight, torch.randn(num_outputs, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SHAPES)
def test_linear_equals_torch(num_inputs: int, num_outputs: int, dtype: torch.dtype):
    x, weight, bias = _case(0, num_inputs, num_outputs, dtype, num_tokens=21)
    expected = (x.double() @ weight.double().T + bias.double()).float()
    torch.testing.assert_close(linear(x, weight, bias), expected, rtol=1e-4, atol=1e-3)


def _rows_alone(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([linear(row, weight) for row in x.split(1)])


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    num_tokens=st.integers(1, 3 * TILE_ROWS + 1),
    num_threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**31),
)
def test_a_row_s_bits_do_not_depend_on_batch_place_or_threads(
    shape, dtype, num_tokens, num_threads, seed
):
    x, weight, _ = _case(seed, *shape, dtype, num_tokens=num_tokens)
    torch.set_num_threads(1)
    alone = _rows_alone(x, weight)
    torch.set_num_threads(num_threads)
    assert torch.equal(linear(x, weight), alone)
    order = torch.randperm(num_tokens)
    assert torch.equal(linear(x[order], weight), alone[order])


def test_several_panels_of_a_widened_weight_give_the_bits_of_one(monkeypatch):
    x, weight, _ = _case(3, 128, 200, torch.bfloat16, num_tokens=5)
    once = linear(x, weight)
    monkeypatch.setattr("serve.kernels.linear._PANEL_VALUES", 128 * 48)
    torch.testing.assert_close(linear(x, weight), once, rtol=1e-6, atol=1e-5)


def test_a_row_that_is_not_finite_leaves_its_neighbours_alone():
    x, weight, _ = _case(4, 64, 48, torch.float32, num_tokens=18)
    expected = linear(x, weight)
    x[3] = torch.nan
    x[9] = torch.inf
    kept = [row for row in range(18) if row not in {3, 9}]
    assert torch.equal(linear(x, weight)[kept], expected[kept])


def test_bits_do_not_depend_on_where_the_input_lies_in_memory():
    x, weight, _ = _case(5, 256, 64, torch.float32, num_tokens=TILE_ROWS)
    shifted = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    assert shifted.data_ptr() % 64 != 0
    assert torch.equal(linear(shifted, weight), linear(x, weight))
