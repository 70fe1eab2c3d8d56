"""The packed product agrees with its torch twin, and a row's bits are the same in any call."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serve.kernels.dtypes import Stored
from serve.kernels.elementwise import silu_and_multiply
from serve.kernels.linear import linear
from serve.kernels.native import NativeLibrary, Pool
from serve.kernels.packed import PackedMatrix

DTYPES = [torch.float32, torch.bfloat16]


def _name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")


def _stored(weight: Tensor) -> Stored:
    if weight.dtype == torch.bfloat16:
        weight = weight.view(torch.uint16)
    stored: Stored = weight.numpy()
    return stored


@dataclass(frozen=True)
class Kernels:
    library: NativeLibrary
    pools: dict[int, Pool]

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> PackedMatrix:
        num_outputs, num_inputs = weight.shape
        if bias is not None:
            width = self.library.panel_width
            bias = torch.nn.functional.pad(bias, (0, -num_outputs % width))
        matrix = PackedMatrix(
            self.pools[1],
            _name(weight.dtype),
            num_outputs,
            num_inputs=num_inputs,
            bias=None if bias is None else bias.numpy(),
        )
        assert matrix.fill_rows(0, 1, _stored(weight))
        return matrix

    def linear(self, matrix: PackedMatrix, x: Tensor, *, num_threads: int = 1) -> Tensor:
        out = torch.full((x.shape[0], matrix.struct.num_outputs + 3), torch.nan)
        self._call("shoal_linear", matrix, x, out, num_threads)
        assert bool(out[:, -3:].isnan().all())
        return out[:, :-3]

    def linear_swiglu(self, matrix: PackedMatrix, x: Tensor, *, num_threads: int = 1) -> Tensor:
        out = torch.full((x.shape[0], matrix.struct.num_outputs // 2), torch.nan)
        self._call("shoal_linear_swiglu", matrix, x, out, num_threads)
        return out

    def unpack_rows(self, matrix: PackedMatrix, rows: list[int]) -> Tensor:
        out = torch.full((len(rows), matrix.num_inputs), torch.nan)
        ids = torch.tensor(rows)
        self.library.functions.shoal_unpack_rows(
            self.pools[2].handle,
            ctypes.byref(matrix.struct),
            ids.data_ptr(),
            len(rows),
            out.data_ptr(),
        )
        return out

    def _call(
        self, name: str, matrix: PackedMatrix, x: Tensor, out: Tensor, num_threads: int
    ) -> None:
        assert x.stride(1) == 1
        getattr(self.library.functions, name)(
            self.pools[num_threads].handle,
            ctypes.byref(matrix.struct),
            x.data_ptr(),
            x.stride(0),
            x.shape[0],
            out.data_ptr(),
            out.stride(0),
        )


@pytest.fixture(scope="module")
def kernels(library: NativeLibrary) -> Iterator[Kernels]:
    pools = {num_threads: library.pool(num_threads) for num_threads in (1, 2, 3)}
    yield Kernels(library, pools)
    for pool in pools.values():
        pool.close()


def _case(
    seed: int, num_inputs: int, num_outputs: int, dtype: torch.dtype, *, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_inputs, generator=generator)
    weight = torch.randn(num_outputs, num_inputs, generator=generator).to(dtype)
    return x, weight, torch.randn(num_outputs, generator=generator)


def _exact(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()


def _assert_close(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, isa: str) -> None:
    """Within what one chain of float32 sums, over bf16 activations if need be, may be off."""
    rounded = weight.dtype == torch.bfloat16 and isa != "avx2"
    seen = x.bfloat16() if rounded else x
    size = x.abs().double() @ weight.abs().double().T
    off = (got.double() - _exact(seen, weight, bias)).abs()
    assert bool((off <= 4e-6 * size + 1e-6).all())


_sizes = st.tuples(
    st.one_of(st.integers(1, 40), st.sampled_from([129, 511, 512, 513, 1100])),
    st.one_of(st.integers(1, 70), st.sampled_from([300, 577])),
)


@settings(max_examples=40, deadline=None)
@given(
    sizes=_sizes,
    dtype=st.sampled_from(DTYPES),
    num_rows=st.integers(1, 70),
    num_threads=st.sampled_from([1, 2, 3]),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_linear_agrees_with_float64_and_its_twin(
    kernels: Kernels, sizes, dtype, num_rows, num_threads, has_bias, seed
):
    x, weight, bias = _case(seed, *sizes, dtype, num_rows=num_rows)
    bias = bias if has_bias else None
    matrix = kernels.pack(weight, bias)
    got = kernels.linear(matrix, x, num_threads=num_threads)[:, : sizes[1]]
    _assert_close(got, x, weight, bias, kernels.library.isa)
    twin = linear(x, weight, bias)
    off = (got - twin).abs().max() / twin.abs().max()
    assert off < 0.02


@settings(max_examples=40, deadline=None)
@given(
    sizes=_sizes,
    dtype=st.sampled_from(DTYPES),
    num_rows=st.integers(1, 70),
    num_threads=st.sampled_from([1, 2, 3]),
    swiglu=st.booleans(),
    stride=st.integers(0, 5),
    data=st.data(),
)
def test_a_row_s_bits_do_not_depend_on_batch_place_threads_or_stride(
    kernels: Kernels, sizes, dtype, num_rows, num_threads, swiglu, stride, data
):
    x, weight, bias = _case(data.draw(st.integers(0, 2**31)), *sizes, dtype, num_rows=num_rows)
    if swiglu:
        weight = _pad(weight, 2 * kernels.library.panel_width)
        bias = _pad(bias[:, None], 2 * kernels.library.panel_width)[:, 0].contiguous()
    matrix = kernels.pack(weight, bias)
    multiply = kernels.linear_swiglu if swiglu else kernels.linear
    alone = torch.cat([multiply(matrix, row) for row in x.split(1)])
    wide = torch.full((num_rows, sizes[0] + stride), torch.nan)[:, : sizes[0]].copy_(x)
    assert torch.equal(multiply(matrix, wide, num_threads=num_threads), alone)
    order = torch.randperm(num_rows)
    start = data.draw(st.integers(0, num_rows - 1))
    shuffled = x[order][start:]
    assert torch.equal(multiply(matrix, shuffled, num_threads=num_threads), alone[order][start:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_blocks_of_rows_and_strips_of_panels_give_the_bits_of_few(
    kernels: Kernels, dtype: torch.dtype
):
    x, weight, _ = _case(7, 1030, 1000, dtype, num_rows=230)
    matrix = kernels.pack(weight)
    many = kernels.linear(matrix, x, num_threads=3)
    few = torch.cat([kernels.linear(matrix, rows) for rows in x.split(5)])
    assert torch.equal(many, few)


def _pad(x: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % multiple))


@settings(max_examples=20, deadline=None)
@given(
    num_inputs=st.integers(1, 90),
    num_pairs=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    num_rows=st.integers(1, 40),
    num_threads=st.sampled_from([1, 2, 3]),
)
def test_swiglu_of_alternating_panels_agrees_with_its_twin(
    kernels: Kernels, num_inputs, num_pairs, dtype, num_rows, num_threads
):
    ffn = num_pairs * kernels.library.panel_width
    x, weight, _ = _case(3, num_inputs, 2 * ffn, dtype, num_rows=num_rows)
    matrix = PackedMatrix(kernels.pools[1], _name(dtype), 2 * ffn, num_inputs=num_inputs)
    assert matrix.fill_rows(0, 2, _stored(weight[:ffn]))
    assert matrix.fill_rows(1, 2, _stored(weight[ffn:]))
    got = kernels.linear_swiglu(matrix, x, num_threads=num_threads)
    seen = x if kernels.library.isa == "avx2" or dtype == torch.float32 else x.bfloat16().float()
    expected = silu_and_multiply(linear(seen, weight))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_swiglu_is_right_where_its_exponential_ends(kernels: Kernels):
    width = kernels.library.panel_width
    gates = torch.tensor([-torch.inf, -1e5, -200, -90, -86, -1e-30, 0, 1e-30, 86, 90, 200, 1e5])
    x = torch.stack((gates, torch.full_like(gates, 2)), dim=1)
    x[0, 0] = -3e38
    weight = torch.zeros(2 * width, 2)
    weight[:width, 0] = 1
    weight[width:, 1] = 1
    got = kernels.linear_swiglu(kernels.pack(weight), x)
    expected = 2 * torch.nn.functional.silu(x[:, :1].double()).float().expand(-1, width)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_leaves_its_neighbours_alone(
    kernels: Kernels, dtype: torch.dtype, bad: float
):
    x, weight, _ = _case(4, 65, 48, dtype, num_rows=15)
    matrix = kernels.pack(weight)
    expected = kernels.linear(matrix, x)
    x[6, 64] = bad
    got = kernels.linear(matrix, x)
    others = torch.arange(15) != 6
    assert torch.equal(got[others], expected[others])
    assert not bool(got[6, :48].isfinite().any())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_beside_padding_of_inputs_is_not_touched_by_what_lies_behind_it(
    kernels: Kernels, dtype: torch.dtype
):
    x, weight, _ = _case(5, 33, 20, dtype, num_rows=4)
    matrix = kernels.pack(weight)
    surrounded = torch.full((4, 40), torch.nan)
    surrounded[:, :33] = x
    assert torch.equal(kernels.linear(matrix, surrounded[:, :33]), kernels.linear(matrix, x))


@settings(max_examples=30, deadline=None)
@given(
    num_inputs=st.integers(1, 300),
    num_outputs=st.integers(1, 100),
    packed=st.sampled_from(DTYPES),
    source=st.sampled_from([*DTYPES, torch.float16]),
    stride=st.integers(0, 7),
)
def test_unpacked_rows_equal_what_was_packed(
    kernels: Kernels, num_inputs, num_outputs, packed, source, stride
):
    wide = torch.randn(num_outputs, num_inputs + stride).to(source)
    wide[0, 0] = 6e-8  # subnormal in float16
    weight = wide[:, :num_inputs]
    matrix = PackedMatrix(kernels.pools[1], _name(packed), num_outputs, num_inputs=num_inputs)
    assert matrix.fill_rows(0, 1, _stored(weight))
    rows = [num_outputs - 1, -1, *range(num_outputs), 0]
    expected = torch.cat((weight, torch.zeros(1, num_inputs))).to(packed).float()
    got = kernels.unpack_rows(matrix, rows)
    assert torch.equal(got, expected[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_packed_panel_by_panel_equal_rows_packed_at_once(kernels: Kernels, dtype: torch.dtype):
    width = kernels.library.panel_width
    weight = torch.randn(4 * width - 3, 21).to(dtype)
    once = kernels.pack(weight)
    apart = PackedMatrix(kernels.pools[1], _name(dtype), 4 * width, num_inputs=21)
    for panel, rows in enumerate(weight.split(width)):
        assert apart.fill_rows(panel, 1, _stored(rows))
    every = [*range(4 * width)]
    assert torch.equal(kernels.unpack_rows(apart, every), kernels.unpack_rows(once, every))


@pytest.mark.parametrize("packed", DTYPES)
@pytest.mark.parametrize("source", [*DTYPES, torch.float16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_packing_reports_a_value_that_is_not_finite(
    kernels: Kernels, packed: torch.dtype, source: torch.dtype, bad: float
):
    weight = torch.ones(50, 270, dtype=source)
    weight[49, 269] = bad
    matrix = PackedMatrix(kernels.pools[2], _name(packed), 50, num_inputs=270)
    assert not matrix.fill_rows(0, 1, _stored(weight))


def test_packing_reports_a_float32_beyond_bfloat16(kernels: Kernels):
    matrix = PackedMatrix(kernels.pools[1], "bfloat16", 1, num_inputs=2)
    assert not matrix.fill_rows(0, 1, np.array([[1.0, np.finfo(np.float32).max]], np.float32))


def test_what_does_not_fit_a_matrix_is_refused(kernels: Kernels):
    width = kernels.library.panel_width
    matrix = PackedMatrix(kernels.pools[1], "float32", width, num_inputs=8)
    for first_panel, shape in ((0, (width + 1, 8)), (1, (1, 8)), (-1, (1, 8)), (0, (1, 9))):
        with pytest.raises(ValueError, match="does not fit"):
            matrix.fill_rows(first_panel, 1, np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="bias must be float32"):
        PackedMatrix(kernels.pools[1], "float32", 5, num_inputs=8, bias=np.zeros(5, np.float32))
