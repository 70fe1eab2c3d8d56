"""Norm, activation, rotation and the products of a single row, for the GPU.

Not products of several rows, which cuBLAS does well. The one decision behind it: at one row a step
is nothing but reading weights, so the small operations between two products ride on them (norm
before, bias, activation or residual after) and cost neither a launch nor a trip through memory.
See `serve.kernels.device`; the twins are in `device_torch`.
"""

# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from .device import Places

_MAX_ELEMENTWISE_BLOCK = 1024
# Rows of a weight, and columns at a time, that one program of a row product reads: 8 KB in flight.
_PRODUCT_ROWS = 4
_PRODUCT_COLUMNS = 1024
_PRODUCT_WARPS = 4


@triton.jit
def norm_kernel(
    x_ptr,
    update_ptr,
    weight_ptr,
    out_ptr,
    hidden,
    eps,
    HAS_UPDATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: add the update to `x` in place, write the normed row."""
    row = tl.program_id(0).to(tl.int64) * hidden
    columns = tl.arange(0, BLOCK)
    is_used = columns < hidden
    x = tl.load(x_ptr + row + columns, mask=is_used, other=0.0)
    if HAS_UPDATE:
        x += tl.load(update_ptr + row + columns, mask=is_used, other=0.0).to(tl.float32)
        tl.store(x_ptr + row + columns, x, mask=is_used)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / hidden + eps)
    weight = tl.load(weight_ptr + columns, mask=is_used, other=0.0)
    normed = x * scale * weight
    tl.store(out_ptr + row + columns, normed.to(out_ptr.dtype.element_ty), mask=is_used)


@triton.jit
def silu_kernel(gate_up_ptr, out_ptr, ffn, BLOCK: tl.constexpr):
    """A block of one row's `silu(gate) * up`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_used = columns < ffn
    gate = tl.load(gate_up_ptr + row * 2 * ffn + columns, mask=is_used, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + (row * 2 + 1) * ffn + columns, mask=is_used, other=0.0)
    product = gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)
    tl.store(out_ptr + row * ffn + columns, product.to(out_ptr.dtype.element_ty), mask=is_used)


@triton.jit
def rotate_kernel(
    qkv_ptr,
    angles_ptr,
    slots_ptr,
    positions_ptr,
    tables_ptr,
    query_ptr,
    keys_ptr,
    values_ptr,
    max_blocks,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each head of each row: queries to `query_ptr`, the rest to the cache."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half: tl.constexpr = HEAD_DIM // 2
    places = tl.arange(0, BLOCK)
    is_used = places < half
    source = qkv_ptr + (row * (NUM_HEADS + 2 * NUM_KV_HEADS) + head) * HEAD_DIM + places
    first = tl.load(source, mask=is_used, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=is_used, other=0.0).to(tl.float32)
    position = tl.load(positions_ptr + row)
    if head < NUM_HEADS + NUM_KV_HEADS:
        angles = angles_ptr + position.to(tl.int64) * HEAD_DIM + places
        cos = tl.load(angles, mask=is_used, other=0.0)
        sin = tl.load(angles + half, mask=is_used, other=0.0)
        turned = first * cos - second * sin
        second = second * cos + first * sin
        first = turned
    if head < NUM_HEADS:
        out = query_ptr + (row * NUM_HEADS + head) * HEAD_DIM + places
        tl.store(out, first.to(query_ptr.dtype.element_ty), mask=is_used)
        tl.store(out + half, second.to(query_ptr.dtype.element_ty), mask=is_used)
    else:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        block = tl.load(tables_ptr + slot * max_blocks + position // BLOCK_SIZE).to(tl.int64)
        token = block * BLOCK_SIZE + position % BLOCK_SIZE
        if head < NUM_HEADS + NUM_KV_HEADS:
            into = keys_ptr + (token * NUM_KV_HEADS + head - NUM_HEADS) * HEAD_DIM + places
            tl.store(into, first.to(keys_ptr.dtype.element_ty), mask=is_used)
            tl.store(into + half, second.to(keys_ptr.dtype.element_ty), mask=is_used)
        else:
            kv_head = head - NUM_HEADS - NUM_KV_HEADS
            into = values_ptr + (token * NUM_KV_HEADS + kv_head) * HEAD_DIM + places
            tl.store(into, first.to(values_ptr.dtype.element_ty), mask=is_used)
            tl.store(into + half, second.to(values_ptr.dtype.element_ty), mask=is_used)


@triton.jit
def row_product_kernel(
    x_ptr,
    weight_ptr,
    norm_ptr,
    bias_ptr,
    out_ptr,
    num_inputs,
    num_outputs,
    eps,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`ROWS` outputs: every row of the weight is read once, front to back.

    The norm's scale is one factor of the whole row, so it is applied to the sums.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_outputs
    starts = rows.to(tl.int64) * num_inputs
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, num_inputs, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_column = columns < num_inputs
        weight = tl.load(
            weight_ptr + starts[:, None] + columns[None, :],
            mask=is_row[:, None] & is_column[None, :],
            other=0.0,
        )
        x = tl.load(x_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += x * x
            x *= tl.load(norm_ptr + columns, mask=is_column, other=0.0)
        sums += weight.to(tl.float32) * x[None, :]
    product = tl.sum(sums, axis=1)
    if HAS_NORM:
        product *= 1.0 / tl.sqrt(tl.sum(squares, axis=0) / num_inputs + eps)
    if HAS_BIAS:
        product += tl.load(bias_ptr + rows, mask=is_row, other=0.0)
    if IS_ADDED:
        product += tl.load(out_ptr + rows, mask=is_row, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows, product.to(out_ptr.dtype.element_ty), mask=is_row)


@triton.jit
def row_gate_up_kernel(
    x_ptr,
    weight_ptr,
    norm_ptr,
    out_ptr,
    num_inputs,
    ffn,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`ROWS` values of `silu(gate) * up`: each needs one row of either half of the weight."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < ffn
    starts = rows.to(tl.int64) * num_inputs
    up_ptr = weight_ptr + ffn.to(tl.int64) * num_inputs
    gates = tl.zeros([ROWS, COLUMNS], tl.float32)
    ups = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, num_inputs, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_column = columns < num_inputs
        is_used = is_row[:, None] & is_column[None, :]
        places = starts[:, None] + columns[None, :]
        gate_weight = tl.load(weight_ptr + places, mask=is_used, other=0.0)
        up_weight = tl.load(up_ptr + places, mask=is_used, other=0.0)
        x = tl.load(x_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
        squares += x * x
        x *= tl.load(norm_ptr + columns, mask=is_column, other=0.0)
        gates += gate_weight.to(tl.float32) * x[None, :]
        ups += up_weight.to(tl.float32) * x[None, :]
    scale = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / num_inputs + eps)
    gate = tl.sum(gates, axis=1) * scale
    product = gate / (1.0 + tl.exp(-gate)) * (tl.sum(ups, axis=1) * scale)
    tl.store(out_ptr + rows, product.to(out_ptr.dtype.element_ty), mask=is_row)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See `DecoderKernels`."""
    out = torch.empty_like(x, dtype=dtype)
    _norm(x, None, weight, out, eps)
    return out


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `DecoderKernels`."""
    out = torch.empty_like(update)
    _norm(x, update, weight, out, eps)
    return out


def _norm(x: Tensor, update: Tensor | None, weight: Tensor, out: Tensor, eps: float) -> None:
    num_rows, hidden = x.shape
    block = triton.next_power_of_2(hidden)
    norm_kernel[(num_rows,)](
        x,
        x if update is None else update,
        weight,
        out,
        hidden,
        eps,
        HAS_UPDATE=update is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
        enable_fp_fusion=True,
    )


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """See `DecoderKernels`."""
    num_rows, ffn = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, ffn)
    block = min(triton.next_power_of_2(ffn), _MAX_ELEMENTWISE_BLOCK)
    silu_kernel[(num_rows, triton.cdiv(ffn, block))](
        gate_up, out, ffn, BLOCK=block, enable_fp_fusion=True
    )
    return out


def rotate_and_store(
    qkv: Tensor, angles: Tensor, places: Places, keys: Tensor, values: Tensor
) -> Tensor:
    """See `DecoderKernels`."""
    num_rows, num_all_heads, head_dim = qkv.shape
    block_size, num_kv_heads = keys.shape[1:3]
    num_heads = num_all_heads - 2 * num_kv_heads
    query = qkv.new_empty(num_rows, num_heads, head_dim)
    rotate_kernel[(num_rows, num_all_heads)](
        qkv,
        angles,
        places.slots,
        places.positions,
        places.block_tables,
        query,
        keys,
        values,
        places.block_tables.shape[1],
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
        enable_fp_fusion=True,
    )
    return query


def multiply_row(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    norm: tuple[Tensor, float] | None = None,
    bias: Tensor | None = None,
    is_added: bool = False,
) -> Tensor:
    """See `DecoderKernels`."""
    num_outputs, num_inputs = weight.shape
    row_product_kernel[(triton.cdiv(num_outputs, _PRODUCT_ROWS),)](
        x,
        weight,
        x if norm is None else norm[0],
        x if bias is None else bias,
        out,
        num_inputs,
        num_outputs,
        0.0 if norm is None else norm[1],
        HAS_NORM=norm is not None,
        HAS_BIAS=bias is not None,
        IS_ADDED=is_added,
        ROWS=_PRODUCT_ROWS,
        COLUMNS=min(triton.next_power_of_2(num_inputs), _PRODUCT_COLUMNS),
        num_warps=_PRODUCT_WARPS,
        enable_fp_fusion=True,
    )
    return out


def multiply_gate_up_row(x: Tensor, weight: Tensor, norm: tuple[Tensor, float]) -> Tensor:
    """See `DecoderKernels`."""
    num_inputs, ffn = weight.shape[1], weight.shape[0] // 2
    out = weight.new_empty(1, ffn)
    rows = _PRODUCT_ROWS // 2
    row_gate_up_kernel[(triton.cdiv(ffn, rows),)](
        x,
        weight,
        norm[0],
        out,
        num_inputs,
        ffn,
        norm[1],
        ROWS=rows,
        COLUMNS=min(triton.next_power_of_2(num_inputs), _PRODUCT_COLUMNS),
        num_warps=_PRODUCT_WARPS,
        enable_fp_fusion=True,
    )
    return out
