"""Paged attention for the GPU: decodes in parts of their context, prompts in tiles of queries.

Not torch's varlen attention: its kernel for block tables wants blocks of 256 tokens, far too coarse
to share prefixes by, and its signature changes from release to release. The one decision behind it:
a decode's context is cut at fixed positions and the parts are summed in order (split-KV, as Dao's
Flash-Decoding), so how many programs share the work is free to follow the batch while a row's bits
do not. Scores and sums are float32. See `serve.kernels.device`; the twins are in `device_torch`.
"""

# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from .device import QUERY_TILE, Places, Workspace

_KV_TILE = 64
_MIN_DOT = 16
_COMBINED_CHUNKS = 16
# Programs wanted at once: a few for each multiprocessor of a large GPU.
_WANTED_PROGRAMS = 512


@triton.jit
def decode_kernel(
    query_ptr,
    keys_ptr,
    values_ptr,
    slots_ptr,
    positions_ptr,
    tables_ptr,
    sums_ptr,
    stats_ptr,
    scale,
    max_blocks,
    max_chunks,
    CHUNK: tl.constexpr,
    KV_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The query heads of one KV head of one row, over every n-th chunk of its context."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    length = tl.load(positions_ptr + row) + 1
    table = tables_ptr + tl.load(slots_ptr + row).to(tl.int64) * max_blocks
    heads = tl.arange(0, GROUP_ROWS)
    dims = tl.arange(0, DIMS)
    is_head = heads < GROUP
    is_dim = dims < HEAD_DIM
    first_head = (row * NUM_KV_HEADS + kv_head) * GROUP
    query = tl.load(
        query_ptr + (first_head + heads[:, None]) * HEAD_DIM + dims[None, :],
        mask=is_head[:, None] & is_dim[None, :],
        other=0.0,
    )
    for chunk in range(tl.program_id(2), tl.cdiv(length, CHUNK), tl.num_programs(2)):
        end = tl.minimum((chunk + 1) * CHUNK, length)
        best = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_ROWS], tl.float32)
        sums = tl.zeros([GROUP_ROWS, DIMS], tl.float32)
        for start in range(chunk * CHUNK, end, KV_TILE):
            tokens = start + tl.arange(0, KV_TILE)
            is_token = tokens < end
            blocks = tl.load(table + tokens // BLOCK_SIZE, mask=is_token, other=0).to(tl.int64)
            places = (blocks * BLOCK_SIZE + tokens % BLOCK_SIZE) * NUM_KV_HEADS + kv_head
            offsets = places[:, None] * HEAD_DIM + dims[None, :]
            is_used = is_token[:, None] & is_dim[None, :]
            keys = tl.load(keys_ptr + offsets, mask=is_used, other=0.0)
            values = tl.load(values_ptr + offsets, mask=is_used, other=0.0)
            scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
            scores = tl.where(is_token[None, :], scores, float("-inf"))
            higher = tl.maximum(best, tl.max(scores, axis=1))
            kept = tl.exp(best - higher)
            weights = tl.exp(scores - higher[:, None])
            total = total * kept + tl.sum(weights, axis=1)
            sums = sums * kept[:, None]
            sums += tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
            best = higher
        parts = (first_head + heads) * max_chunks + chunk
        tl.store(
            sums_ptr + parts[:, None] * HEAD_DIM + dims[None, :],
            sums,
            mask=is_head[:, None] & is_dim[None, :],
        )
        tl.store(stats_ptr + parts * 2, best, mask=is_head)
        tl.store(stats_ptr + parts * 2 + 1, total, mask=is_head)


@triton.jit
def combine_kernel(
    sums_ptr,
    stats_ptr,
    positions_ptr,
    out_ptr,
    max_chunks,
    CHUNK: tl.constexpr,
    ALL_CHUNKS: tl.constexpr,
    CHUNKS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
):
    """One program a head of a row: its chunks, weighed against the best score of all."""
    row = tl.program_id(0).to(tl.int64)
    head = row * NUM_HEADS + tl.program_id(1)
    num_chunks = tl.cdiv(tl.load(positions_ptr + row) + 1, CHUNK)
    parts = head * max_chunks + tl.arange(0, ALL_CHUNKS)
    is_part = tl.arange(0, ALL_CHUNKS) < num_chunks
    best = tl.max(tl.load(stats_ptr + parts * 2, mask=is_part, other=float("-inf")), axis=0)
    dims = tl.arange(0, DIMS)
    is_dim = dims < HEAD_DIM
    total = tl.zeros([DIMS], tl.float32)
    sums = tl.zeros([DIMS], tl.float32)
    for start in range(0, num_chunks, CHUNKS):
        chunks = start + tl.arange(0, CHUNKS)
        is_chunk = chunks < num_chunks
        some = head * max_chunks + chunks
        highest = tl.load(stats_ptr + some * 2, mask=is_chunk, other=float("-inf"))
        kept = tl.exp(highest - best)
        total += tl.sum(kept * tl.load(stats_ptr + some * 2 + 1, mask=is_chunk, other=0.0), axis=0)
        found = tl.load(
            sums_ptr + some[:, None] * HEAD_DIM + dims[None, :],
            mask=is_chunk[:, None] & is_dim[None, :],
            other=0.0,
        )
        sums += tl.sum(found * kept[:, None], axis=0)
    out = sums / total
    tl.store(out_ptr + head * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), mask=is_dim)


@triton.jit
def tile_kernel(
    query_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    tiles_ptr,
    out_ptr,
    scale,
    max_blocks,
    QUERIES: tl.constexpr,
    KV_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One head of one tile of neighbouring queries, over all that its last one sees."""
    tile = tiles_ptr + tl.program_id(0) * 4
    head = tl.program_id(1)
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    first_row = tl.load(tile).to(tl.int64)
    num_rows = tl.load(tile + 1)
    first_position = tl.load(tile + 2)
    table = tables_ptr + tl.load(tile + 3).to(tl.int64) * max_blocks
    rows = tl.arange(0, QUERIES)
    dims = tl.arange(0, DIMS)
    is_dim = dims < HEAD_DIM
    is_used_row = (rows < num_rows)[:, None] & is_dim[None, :]
    row_offsets = ((first_row + rows[:, None]) * NUM_HEADS + head) * HEAD_DIM + dims[None, :]
    query = tl.load(query_ptr + row_offsets, mask=is_used_row, other=0.0)
    length = first_position + num_rows
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, DIMS], tl.float32)
    for start in range(0, length, KV_TILE):
        tokens = start + tl.arange(0, KV_TILE)
        is_token = tokens < length
        blocks = tl.load(table + tokens // BLOCK_SIZE, mask=is_token, other=0).to(tl.int64)
        places = (blocks * BLOCK_SIZE + tokens % BLOCK_SIZE) * NUM_KV_HEADS + kv_head
        offsets = places[:, None] * HEAD_DIM + dims[None, :]
        is_used = is_token[:, None] & is_dim[None, :]
        keys = tl.load(keys_ptr + offsets, mask=is_used, other=0.0)
        values = tl.load(values_ptr + offsets, mask=is_used, other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
        is_seen = tokens[None, :] <= first_position + rows[:, None]
        scores = tl.where(is_seen & is_token[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))
        kept = tl.exp(best - higher)
        weights = tl.exp(scores - higher[:, None])
        total = total * kept + tl.sum(weights, axis=1)
        sums = sums * kept[:, None]
        sums += tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        best = higher
    out = sums / total[:, None]
    tl.store(out_ptr + row_offsets, out.to(out_ptr.dtype.element_ty), mask=is_used_row)


def attend_decodes(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Places,
    workspace: Workspace,
    out: Tensor,
) -> None:
    """See `AttentionKernels`."""
    num_rows, num_heads, head_dim = query.shape
    block_size, num_kv_heads = keys.shape[1:3]
    max_chunks = workspace.stats.shape[2]
    dims = max(triton.next_power_of_2(head_dim), _MIN_DOT)
    group_size = num_heads // num_kv_heads
    wanted = triton.cdiv(_WANTED_PROGRAMS, num_rows * num_kv_heads)
    decode_kernel[(num_rows, num_kv_heads, min(max_chunks, wanted))](
        query,
        keys,
        values,
        places.slots,
        places.positions,
        places.block_tables,
        workspace.sums,
        workspace.stats,
        head_dim**-0.5,
        places.block_tables.shape[1],
        max_chunks,
        CHUNK=workspace.chunk_tokens,
        KV_TILE=_KV_TILE,
        BLOCK_SIZE=block_size,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group_size,
        GROUP_ROWS=max(triton.next_power_of_2(group_size), _MIN_DOT),
        HEAD_DIM=head_dim,
        DIMS=dims,
        PRECISION=_precision(keys),
        num_warps=4,
        num_stages=2,
        enable_fp_fusion=True,
    )
    combine_kernel[(num_rows, num_heads)](
        workspace.sums,
        workspace.stats,
        places.positions,
        out,
        max_chunks,
        CHUNK=workspace.chunk_tokens,
        ALL_CHUNKS=max(triton.next_power_of_2(max_chunks), _COMBINED_CHUNKS),
        CHUNKS=_COMBINED_CHUNKS,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        DIMS=dims,
        num_warps=4,
        enable_fp_fusion=True,
    )


def attend_tiles(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    tiles: Tensor,
    out: Tensor,
) -> None:
    """See `AttentionKernels`."""
    num_heads, head_dim = query.shape[1:]
    block_size, num_kv_heads = keys.shape[1:3]
    tile_kernel[(tiles.shape[0], num_heads)](
        query,
        keys,
        values,
        block_tables,
        tiles,
        out,
        head_dim**-0.5,
        block_tables.shape[1],
        QUERIES=QUERY_TILE,
        KV_TILE=_KV_TILE if keys.element_size() == 2 else _KV_TILE // 2,
        BLOCK_SIZE=block_size,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        DIMS=max(triton.next_power_of_2(head_dim), _MIN_DOT),
        PRECISION=_precision(keys),
        num_warps=4,
        num_stages=2,
        enable_fp_fusion=True,
    )


def _precision(cache: Tensor) -> str:
    """float32 products in full; it does not concern narrower types."""
    return "ieee" if cache.element_size() == 4 else "tf32"
