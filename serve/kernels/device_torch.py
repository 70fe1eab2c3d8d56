"""The kernels of a device in plain torch: what the Triton ones are held against.

Not fast, and no part of a CUDA graph: some functions look at values on the host. See
`serve.kernels.device` for what each one does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .device import Drawing, Places, Rules, Workspace

_NEG_INF = float("-inf")


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See `DecoderKernels`."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * scale * weight).to(dtype)


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `DecoderKernels`."""
    x += update
    return rms_norm(x, weight, eps, update.dtype)


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """See `DecoderKernels`."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def rotate_and_store(
    qkv: Tensor, angles: Tensor, places: Places, keys: Tensor, values: Tensor
) -> Tensor:
    """See `DecoderKernels`."""
    num_kv_heads, block_size = keys.shape[2], keys.shape[1]
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    positions = places.positions.long()
    cos, sin = angles[positions].unsqueeze(1).chunk(2, dim=-1)
    first, second = qkv[:, : num_heads + num_kv_heads].float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    blocks = places.block_tables[places.slots.long(), positions // block_size].long()
    keys[blocks, positions % block_size] = rotated[:, num_heads:].to(keys.dtype)
    values[blocks, positions % block_size] = qkv[:, num_heads + num_kv_heads :].to(values.dtype)
    return rotated[:, :num_heads].to(qkv.dtype)


def multiply_row(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    norm: tuple[Tensor, float] | None = None,
    bias: Tensor | None = None,
    is_added: bool = False,
) -> Tensor:
    """See `DecoderKernels`."""
    if norm is not None:
        x = rms_norm(x, *norm, torch.float32)
    product = x.to(weight.dtype) @ weight.t()
    if bias is not None:
        product = product + bias
    return out.add_(product) if is_added else out.copy_(product)


def multiply_gate_up_row(x: Tensor, weight: Tensor, norm: tuple[Tensor, float]) -> Tensor:
    """See `DecoderKernels`."""
    return silu_and_multiply(rms_norm(x, *norm, weight.dtype) @ weight.t())


def attend_decodes(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Places,
    workspace: Workspace,
    out: Tensor,
) -> None:
    """See `AttentionKernels`."""
    lengths = (places.positions + 1).tolist()
    for row, (slot, length) in enumerate(zip(places.slots.tolist(), lengths, strict=True)):
        table = places.block_tables[slot]
        out[row] = _attend(query[row : row + 1], keys, values, table, length - 1)[0]


def attend_tiles(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    tiles: Tensor,
    out: Tensor,
) -> None:
    """See `AttentionKernels`."""
    for first_row, num_rows, first_position, slot in tiles.tolist():
        rows = slice(first_row, first_row + num_rows)
        out[rows] = _attend(query[rows], keys, values, block_tables[slot], first_position)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, table: Tensor, first_position: int
) -> Tensor:
    """Neighbouring rows of one sequence, from `first_position` on."""
    num_rows, num_heads, head_dim = query.shape
    length, (block_size, num_kv_heads) = first_position + num_rows, keys.shape[1:3]
    blocks = table[: -(-length // block_size)].long()
    group_size = num_heads // num_kv_heads
    key, value = (
        cache[blocks].flatten(0, 1)[:length].float().repeat_interleave(group_size, dim=1)
        for cache in (keys, values)
    )
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) * head_dim**-0.5
    rows = torch.arange(first_position, length, device=query.device)
    hidden = torch.arange(length, device=query.device) > rows.unsqueeze(1)
    weights = scores.masked_fill(hidden, _NEG_INF).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)


def adjust(logits: Tensor, rules: Rules, num_ids: int) -> Tensor:
    """See `SamplingKernels`."""
    slots = rules.slots.long()
    counts = rules.counts[slots, :num_ids].float()
    is_seen = rules.is_in_prompt[slots, :num_ids] | (counts > 0)
    repetition, presence, frequency = rules.penalties.unsqueeze(-1).unbind(1)
    scores = logits[:, :num_ids]
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(is_seen, repeated, scores)
    scores = scores - (counts * frequency + (counts > 0).float() * presence)
    ids = torch.arange(num_ids, device=logits.device)
    words = rules.masks[rules.mask_rows.long().clamp(min=0)][:, ids // 32]
    is_allowed = ((words >> (ids % 32)) & 1).bool() | (rules.mask_rows < 0).unsqueeze(1)
    return scores.masked_fill(~is_allowed, _NEG_INF)


def draw(scores: Tensor, drawing: Drawing) -> Tensor:
    """See `SamplingKernels`; sorts every row whole."""
    num_ids = scores.shape[1]
    ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
    temperatures = drawing.temperatures.clamp(min=1e-5).unsqueeze(1)
    weights = ((ordered - ordered[:, :1]) / temperatures).exp()
    places = torch.arange(num_ids, device=scores.device)
    top_k = torch.where(drawing.top_k > 0, drawing.top_k, num_ids).unsqueeze(1)
    weights = weights.masked_fill(places >= top_k, 0.0)
    cumulative = weights.double().cumsum(-1)
    total = cumulative[:, -1:]
    num_kept = top_k.long().clamp(max=num_ids)
    crossing = torch.searchsorted(cumulative, drawing.top_p.unsqueeze(1) * total) + 1
    num_kept = torch.where(drawing.top_p.unsqueeze(1) < 1.0, crossing.minimum(num_kept), num_kept)
    num_likely = (weights >= drawing.min_p.unsqueeze(1)).sum(-1, keepdim=True).clamp(min=1)
    num_kept = torch.where(drawing.min_p.unsqueeze(1) > 0, num_likely.minimum(num_kept), num_kept)
    total = cumulative.gather(1, num_kept - 1)
    target = drawing.numbers.unsqueeze(1) * total
    place = torch.searchsorted(cumulative, target, right=True).minimum(num_kept - 1)
    return ids.gather(1, place).squeeze(1)
