"""Every Triton kernel against its torch twin: on a GPU, or run by Triton's interpreter on a CPU.

Collected by `test_kernels.py` in a process of its own: the interpreter is chosen at import.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from serve.kernels import (
    device_torch,
    triton_attention,
    triton_decoder,
    triton_sampling,
)
from serve.kernels.device import (
    QUERY_TILE,
    AttentionKernels,
    Drawing,
    Places,
    Rules,
    Workspace,
)
from serve.kernels.device_draw import draw_from_best

IS_INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter multiplies the bits of bfloat16 matrices as integers: float16 stands for both.
DOT_DTYPES = [torch.float32, torch.float16] if IS_INTERPRETED else DTYPES


@pytest.fixture(autouse=True)
def _on_device() -> Iterator[None]:
    with DEVICE:
        yield


def _random(*dims: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*dims, generator=_generator(seed), device="cpu").to(DEVICE, dtype)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype
    limit = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[wanted.dtype]
    torch.testing.assert_close(found, wanted, atol=limit, rtol=limit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [80, 896])
def test_norms_agree(hidden: int, dtype: torch.dtype) -> None:
    x, update = _random(3, hidden), _random(3, hidden, dtype=dtype, seed=1)
    weight = _random(hidden, seed=2)
    _assert_close(
        triton_decoder.rms_norm(x, weight, 1e-6, dtype),
        device_torch.rms_norm(x, weight, 1e-6, dtype),
    )
    streams = x.clone(), x.clone()
    _assert_close(
        triton_decoder.add_rms_norm(streams[0], update, weight, 1e-6),
        device_torch.add_rms_norm(streams[1], update, weight, 1e-6),
    )
    assert torch.equal(*streams)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_agree(dtype: torch.dtype) -> None:
    gate_up = _random(3, 2 * 1300, dtype=dtype)
    _assert_close(
        triton_decoder.silu_and_multiply(gate_up), device_torch.silu_and_multiply(gate_up)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(7, 48), (64, 1500), (6, 2100)])
def test_row_products_agree(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> None:
    x, weight = _random(1, num_inputs), _random(num_outputs, num_inputs, dtype=dtype, seed=1)
    norm, bias = _random(num_inputs, seed=2), _random(num_outputs, seed=3)
    scale = num_inputs**-0.5

    def products(kernels: object) -> list[torch.Tensor]:
        plain = torch.empty(1, num_outputs)
        kernels.multiply_row(x * scale, weight, plain)  # type: ignore[attr-defined]
        normed = torch.empty(1, num_outputs)
        kernels.multiply_row(x, weight * scale, normed, (norm, 1e-6), bias)  # type: ignore[attr-defined]
        added = bias[None].clone()
        kernels.multiply_row(x * scale, weight, added, is_added=True)  # type: ignore[attr-defined]
        return [product.to(dtype) for product in (plain, normed, added)]

    for found, wanted in zip(products(triton_decoder), products(device_torch), strict=True):
        _assert_close(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_up_rows_agree(dtype: torch.dtype) -> None:
    x, weight = _random(1, 1100), (_random(2 * 33, 1100, seed=1) * 0.03).to(dtype)
    norm = (_random(1100, seed=2), 1e-6)
    _assert_close(
        triton_decoder.multiply_gate_up_row(x, weight, norm),
        device_torch.multiply_gate_up_row(x, weight, norm),
    )


def _cache(
    *, num_slots: int, max_blocks: int, block_size: int, num_kv_heads: int, head_dim: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Keys, values and the block tables of slots whose blocks lie shuffled."""
    num_blocks = num_slots * max_blocks
    dims = (num_blocks, block_size, num_kv_heads, head_dim)
    order = torch.randperm(num_blocks, generator=_generator(5), device="cpu").to(DEVICE)
    tables = order.view(num_slots, max_blocks).to(torch.int32)
    return _random(*dims, dtype=dtype, seed=6), _random(*dims, dtype=dtype, seed=7), tables


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 48, 64])
def test_rotation_writes_the_same_cache(head_dim: int, dtype: torch.dtype) -> None:
    keys, values, tables = _cache(
        num_slots=3, max_blocks=4, block_size=8, num_kv_heads=2, head_dim=head_dim, dtype=dtype
    )
    places = Places(torch.tensor([2, 0, 1]).int(), torch.tensor([0, 31, 8]).int(), tables)
    qkv, angles = _random(3, 6 + 4, head_dim, dtype=dtype), _random(32, head_dim, seed=1)
    caches = [(keys.clone(), values.clone()) for _ in range(2)]
    _assert_close(
        triton_decoder.rotate_and_store(qkv, angles, places, *caches[0]),
        device_torch.rotate_and_store(qkv, angles, places, *caches[1]),
    )
    _assert_close(caches[0][0], caches[1][0])
    assert torch.equal(caches[0][1], caches[1][1])
    assert not torch.equal(caches[0][1], values)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "dtype"),
    [
        (7, 1, 64, 16, torch.float16),
        (4, 4, 16, 32, torch.float32),
        (6, 2, 48, 16, torch.float32),
        (40, 2, 32, 16, torch.float16),
    ],
)
def test_decodes_agree(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    max_tokens = 544
    keys, values, tables = _cache(
        num_slots=4, max_blocks=max_tokens // block_size, block_size=block_size,
        num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype,
    )  # fmt: skip
    places = Places(torch.tensor([3, 0, 1]).int(), torch.tensor([0, 530, 255]).int(), tables)
    query = _random(3, num_heads, head_dim, dtype=dtype)
    workspace = Workspace.make(
        max_rows=3,
        num_heads=num_heads,
        head_dim=head_dim,
        max_tokens=max_tokens,
        device=DEVICE,
    )
    found, wanted = torch.empty_like(query), torch.empty_like(query)
    triton_attention.attend_decodes(query, keys, values, places, workspace, found)
    device_torch.attend_decodes(query, keys, values, places, workspace, wanted)
    _assert_close(found, wanted)
    alone = torch.empty_like(query[1:2])
    places = Places(places.slots[1:2], places.positions[1:2], tables)
    triton_attention.attend_decodes(query[1:2], keys, values, places, workspace, alone)
    assert torch.equal(alone[0], found[1]), "a row's bits depend on the batch"


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 64), (3, 1, 48)])
def test_prompts_agree(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    keys, values, tables = _cache(
        num_slots=2, max_blocks=16, block_size=16, num_kv_heads=num_kv_heads, head_dim=head_dim,
        dtype=dtype,
    )  # fmt: skip
    query = _random(QUERY_TILE + 30, num_heads, head_dim, dtype=dtype)
    tiles = torch.tensor([[0, QUERY_TILE, 40, 1], [QUERY_TILE, 29, 40 + QUERY_TILE, 1],
                          [QUERY_TILE + 29, 1, 0, 0]]).int()  # fmt: skip
    found, wanted = torch.empty_like(query), torch.empty_like(query)
    triton_attention.attend_tiles(query, keys, values, tables, tiles, found)
    device_torch.attend_tiles(query, keys, values, tables, tiles, wanted)
    _assert_close(found, wanted)


@pytest.mark.parametrize("kernels", [triton_attention, device_torch], ids=["triton", "torch"])
def test_what_others_left_in_a_block_is_never_read(kernels: AttentionKernels) -> None:
    keys, values, tables = _cache(
        num_slots=2, max_blocks=4, block_size=16, num_kv_heads=2, head_dim=16, dtype=torch.float32
    )
    first, second = tables[1, :2].tolist()
    caches = [torch.full_like(keys, torch.nan), torch.full_like(values, torch.nan)]
    for poisoned, sound in zip(caches, (keys, values), strict=True):
        poisoned[first], poisoned[second, :5] = sound[first], sound[second, :5]
    query = _random(3, 4, 16)
    places = Places(torch.tensor([1]).int(), torch.tensor([20]).int(), tables)
    workspace = Workspace.make(max_rows=1, num_heads=4, head_dim=16, max_tokens=64, device=DEVICE)
    tiles = torch.tensor([[0, 3, 18, 1]]).int()
    found = []
    for one in ((keys, values), caches):
        decoded, prompt = torch.empty_like(query[:1]), torch.empty_like(query)
        kernels.attend_decodes(query[:1], *one, places, workspace, decoded)
        kernels.attend_tiles(query, *one, tables, tiles, prompt)
        found.append(torch.cat((decoded, prompt)))
    assert bool(found[0].isfinite().all())
    assert torch.equal(*found)


def test_adjusted_scores_agree() -> None:
    num_rows, vocab_size, num_ids = 4, 1100, 1075
    logits = _random(num_rows, vocab_size)
    words = torch.randint(0, 2**31 - 1, (2, 34), generator=_generator(3), device="cpu")
    masks = (words * 2 - 2**31).to(DEVICE, torch.int32)
    counts = torch.randint(0, 3, (5, vocab_size), generator=_generator(4), device="cpu")
    rules = Rules(
        slots=torch.tensor([4, 0, 2, 3]).int(),
        penalties=torch.tensor([[1.3, 0.5, 0.25], [1, 0, 0], [1, 0, 0.7], [0.8, -1, 0]]),
        is_in_prompt=_random(5, vocab_size, seed=5) > 0.5,
        counts=counts.to(DEVICE, torch.int16),
        mask_rows=torch.tensor([-1, 0, -1, 1]).int(),
        masks=masks,
    )
    before = logits.clone()
    found = triton_sampling.adjust(logits, rules, num_ids)
    wanted = device_torch.adjust(logits, rules, num_ids)
    assert torch.equal(logits, before)
    assert torch.isneginf(found).equal(torch.isneginf(wanted))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def _drawing(num_rows: int, **columns: float) -> Drawing:
    numbers = torch.arange(num_rows, dtype=torch.float64) / num_rows + 1e-7

    def column(name: str, default: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((num_rows,), columns.get(name, default), dtype=dtype)

    return Drawing(
        temperatures=column("temperature", 1.0, torch.float32),
        top_k=column("top_k", 0, torch.int64),
        top_p=column("top_p", 1.0, torch.float64),
        min_p=column("min_p", 0.0, torch.float32),
        numbers=numbers,
    )


CUTS: list[dict[str, float]] = [
    {},
    {"temperature": 0.4},
    {"top_k": 20},
    {"top_k": 300},
    {"top_p": 0.8},
    {"top_p": 0.8, "top_k": 20, "temperature": 0.7},
    {"top_p": 0.95, "top_k": 400, "min_p": 0.05},
    {"min_p": 0.2},
    {"min_p": 1e-3, "temperature": 1.5},
]


@pytest.mark.parametrize(
    ("columns", "is_rounded"),
    [*((columns, True) for columns in CUTS), *((columns, False) for columns in CUTS[2:8:3])],
    ids=str,
)
def test_draws_agree(columns: dict[str, float], is_rounded: bool) -> None:
    """With ties the last of the best scores is shared, so that the slow kernel decides."""
    scores = _random(4, 420) * 2
    if is_rounded:
        scores = scores.round()
    scores[:, ::7] = -torch.inf
    drawing = _drawing(4, **columns)
    found = triton_sampling.draw(scores, drawing)
    wanted = device_torch.draw(scores, drawing)
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("top_k", [20, 300, 1000, 5000])
def test_top_p_is_a_share_of_what_top_k_keeps(top_k: int) -> None:
    """Of a flat row, where the best scores are a small part of the weight that top_k keeps."""
    scores, drawing = _random(4, 1500) * 0.3, _drawing(4, top_k=top_k, top_p=0.2)
    assert triton_sampling.draw(scores, drawing).equal(device_torch.draw(scores, drawing))


def test_some_draws_are_settled_by_the_best_and_some_are_not() -> None:
    scores = _random(8, 700) * 2
    settled = draw_from_best(scores, _drawing(8, top_k=20))[1]
    assert settled.all()
    flat = draw_from_best(scores * 0.1, _drawing(8))[1]
    assert not flat.all()
