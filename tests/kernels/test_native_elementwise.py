"""Residual and norm in C++ agree with their twin, and a row's bits are the same in any call."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serve.kernels.elementwise import rms_norm
from serve.kernels.native import NativeLibrary, Pool

EPS = 1e-6


@pytest.fixture(scope="module")
def pools(library: NativeLibrary) -> Iterator[dict[int, Pool]]:
    pools = {num_threads: library.pool(num_threads) for num_threads in (1, 2, 3)}
    yield pools
    for pool in pools.values():
        pool.close()


def _add_rms_norm(
    pool: Pool, residual: Tensor, delta: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The new residual and the normed rows."""
    residual, out = residual.clone(), torch.full_like(residual, torch.nan)
    pool.library.functions.shoal_add_rms_norm(
        pool.handle,
        residual.data_ptr(),
        None if delta is None else delta.data_ptr(),
        weight.data_ptr(),
        EPS,
        *residual.shape,
        out.data_ptr(),
    )
    return residual, out


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(1, 70),
    hidden=st.one_of(st.integers(1, 80), st.sampled_from([896, 1216, 2432])),
    num_threads=st.sampled_from([1, 2, 3]),
    has_delta=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_add_rms_norm_agrees_with_its_twin_and_a_row_with_itself_alone(
    pools, num_rows, hidden, num_threads, has_delta, seed
):
    generator = torch.Generator().manual_seed(seed)
    residual, added = 4 * torch.randn(2, num_rows, hidden, generator=generator)
    weight = torch.randn(hidden, generator=generator)
    delta = added if has_delta else None

    after, out = _add_rms_norm(pools[num_threads], residual, delta, weight)

    assert torch.equal(after, residual + added if has_delta else residual)
    torch.testing.assert_close(out, rms_norm(after, weight, EPS), rtol=1e-5, atol=1e-5)
    row = seed % num_rows
    _, alone = _add_rms_norm(
        pools[1], residual[row : row + 1], delta[row : row + 1] if has_delta else None, weight
    )
    assert torch.equal(alone[0], out[row])


def test_a_row_that_is_not_finite_leaves_its_neighbours_alone(pools):
    residual, weight = torch.randn(5, 70), torch.ones(70)
    _, expected = _add_rms_norm(pools[1], residual, None, weight)
    residual[2, 69] = torch.nan
    _, out = _add_rms_norm(pools[1], residual, None, weight)
    others = [0, 1, 3, 4]
    assert torch.equal(out[others], expected[others])
    assert bool(out[2].isnan().all())
