"""Sampling on the GPU: penalties and masks in one pass, and the draw without sorting a vocabulary.

The one decision behind it: the 256 best scores of a row settle nearly every draw, and torch finds
them in a few passes; a row that they do not settle (flat, or cut far behind them) goes through a
kernel that finds the drawn id by bisection over the scores. Nothing waits for the host to know
which. See `serve.kernels.device`; the twins are in `device_torch`.
"""

# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from .device import Drawing, Rules
from .device_draw import MIN_TEMPERATURE, draw_from_best

_BLOCK = 1024
# A row's draw passes over it some fifty times in one program: many loads at once.
_DRAW_BLOCK = 4096
_DRAW_WARPS = 16


@triton.jit
def adjust_kernel(
    logits_ptr,
    scores_ptr,
    slots_ptr,
    penalties_ptr,
    prompt_ptr,
    counts_ptr,
    mask_rows_ptr,
    masks_ptr,
    row_stride,
    vocab_size,
    num_ids,
    num_words,
    BLOCK: tl.constexpr,
):
    """A block of one row."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_id = ids < num_ids
    slot = tl.load(slots_ptr + row).to(tl.int64)
    repetition = tl.load(penalties_ptr + row * 3)
    presence = tl.load(penalties_ptr + row * 3 + 1)
    frequency = tl.load(penalties_ptr + row * 3 + 2)
    scores = tl.load(logits_ptr + row * row_stride + ids, mask=is_id, other=0.0)
    counts = tl.load(counts_ptr + slot * vocab_size + ids, mask=is_id, other=0).to(tl.float32)
    in_prompt = tl.load(prompt_ptr + slot * vocab_size + ids, mask=is_id, other=0)
    is_seen = (in_prompt != 0) | (counts > 0.0)
    repeated = tl.where(scores > 0.0, scores / repetition, scores * repetition)
    scores = tl.where(is_seen, repeated, scores)
    scores -= counts * frequency + tl.where(counts > 0.0, presence, 0.0)
    mask_row = tl.load(mask_rows_ptr + row).to(tl.int64)
    if mask_row >= 0:
        words = tl.load(masks_ptr + mask_row * num_words + ids // 32, mask=is_id, other=0)
        is_allowed = ((words >> (ids % 32)) & 1) != 0
        scores = tl.where(is_allowed, scores, float("-inf"))
    tl.store(scores_ptr + row * num_ids + ids, scores, mask=is_id)


@triton.jit
def _keys(scores):
    """Integers in the order of the scores; 0.0 and -0.0 are the same."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _weight(key, best, temperature):
    """The weight of the score that has this key."""
    bits = key.to(tl.int32)
    score = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
    return tl.exp((score - best) / temperature)


@triton.jit
def _measure(
    row_ptr,
    num_ids,
    key,
    best,
    temperature,
    end_key,
    num_ties,
    min_p,
    BY_COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Ids, or their weight, of scores from `key` up, within the prefix that ends in its ties."""
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, num_ids, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        scores = tl.load(row_ptr + ids, mask=ids < num_ids, other=float("-inf"))
        keys = _keys(scores)
        is_in = (ids < num_ids) & (keys >= key) & (keys > end_key)
        if BY_COUNT:
            sums += tl.where(is_in, 1.0, 0.0)
        else:
            weights = tl.exp((scores - best) / temperature)
            is_likely = (weights >= min_p) | (scores == best)
            sums += tl.where(is_in & is_likely, weights, 0.0)
    found = tl.sum(sums, axis=0)
    if key <= end_key:
        if BY_COUNT:
            found += num_ties
        else:
            weight = _weight(end_key, best, temperature)
            found += tl.where(weight >= min_p, weight, 0.0).to(tl.float64) * num_ties
    return found


@triton.jit
def _prefix(
    row_ptr,
    num_ids,
    wanted,
    best,
    temperature,
    end_key,
    num_ties,
    min_p,
    BY_COUNT: tl.constexpr,
    IS_STRICT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Key and ties of the shortest prefix that measures at least (or more than) `wanted`."""
    low = end_key
    high = _keys(best) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        found = _measure(row_ptr, num_ids, middle, best, temperature, end_key, num_ties, min_p,
                         BY_COUNT, BLOCK)  # fmt: skip
        is_enough = found > wanted if IS_STRICT else found >= wanted
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
    above = _measure(row_ptr, num_ids, low + 1, best, temperature, end_key, num_ties, min_p,
                     BY_COUNT, BLOCK)  # fmt: skip
    missing = wanted - above
    if not BY_COUNT:
        missing = missing / _weight(low, best, temperature).to(tl.float64)
    ties = tl.floor(missing) + 1.0 if IS_STRICT else tl.ceil(missing)
    ties = tl.maximum(ties, 1.0)
    if low == end_key:
        ties = tl.minimum(ties, num_ties)
    return low, ties


@triton.jit
def draw_kernel(
    scores_ptr,
    is_settled_ptr,
    temperatures_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    numbers_ptr,
    out_ptr,
    num_ids,
    BLOCK: tl.constexpr,
):
    """One program a row: each cut is a prefix of the sorted row, and so is all before the draw."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(is_settled_ptr + row) == 0:
        row_ptr = scores_ptr + row * num_ids
        temperature = tl.load(temperatures_ptr + row)
        bests = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, num_ids, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            some = tl.load(row_ptr + ids, mask=ids < num_ids, other=float("-inf"))
            bests = tl.maximum(bests, some)
        best = tl.max(bests, axis=0)
        # Behind every id with a finite score.
        end_key = _keys(best - float("inf"))
        num_ties = tl.sum(tl.zeros([BLOCK], tl.float64), axis=0)
        top_k = tl.load(top_k_ptr + row)
        if top_k > 0:
            end_key, num_ties = _prefix(
                row_ptr, num_ids, top_k.to(tl.float64), best, temperature, end_key, num_ties, 0.0,
                True, False, BLOCK,
            )  # fmt: skip
        top_p = tl.load(top_p_ptr + row)
        if top_p < 1.0:
            total = _measure(row_ptr, num_ids, end_key, best, temperature, end_key, num_ties, 0.0,
                             False, BLOCK)  # fmt: skip
            end_key, num_ties = _prefix(
                row_ptr, num_ids, top_p * total, best, temperature, end_key, num_ties, 0.0,
                False, False, BLOCK,
            )  # fmt: skip
        min_p = tl.load(min_p_ptr + row)
        total = _measure(row_ptr, num_ids, end_key, best, temperature, end_key, num_ties, min_p,
                         False, BLOCK)  # fmt: skip
        key, place = _prefix(
            row_ptr, num_ids, tl.load(numbers_ptr + row) * total, best, temperature, end_key,
            num_ties, min_p, False, True, BLOCK,
        )  # fmt: skip
        # The `place`-th of the ids with this score, or the last of them.
        num_before = tl.sum(tl.zeros([BLOCK], tl.int32), axis=0)
        found = num_before - 1
        for start in range(0, num_ids, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            some = tl.load(row_ptr + ids, mask=ids < num_ids, other=float("-inf"))
            is_tie = (_keys(some) == key) & (ids < num_ids)
            ties = num_before + tl.cumsum(is_tie.to(tl.int32), axis=0)
            is_it = is_tie & (ties <= place)
            found = tl.maximum(found, tl.max(tl.where(is_it, ids, -1), axis=0))
            num_before += tl.sum(is_tie.to(tl.int32), axis=0)
        tl.store(out_ptr + row, found.to(tl.int64), mask=found >= 0)


def adjust(logits: Tensor, rules: Rules, num_ids: int) -> Tensor:
    """See `SamplingKernels`."""
    num_rows = logits.shape[0]
    scores = torch.empty(num_rows, num_ids, dtype=torch.float32, device=logits.device)
    adjust_kernel[(num_rows, triton.cdiv(num_ids, _BLOCK))](
        logits,
        scores,
        rules.slots,
        rules.penalties,
        rules.is_in_prompt.view(torch.uint8),
        rules.counts,
        rules.mask_rows,
        rules.masks,
        logits.stride(0),
        rules.counts.shape[1],
        num_ids,
        rules.masks.shape[1],
        BLOCK=_BLOCK,
        enable_fp_fusion=True,
    )
    return scores


def draw(scores: Tensor, drawing: Drawing) -> Tensor:
    """See `SamplingKernels`."""
    scores = scores.contiguous()
    drawn, is_settled = draw_from_best(scores, drawing)
    draw_kernel[(scores.shape[0],)](
        scores,
        is_settled.to(torch.int32),
        drawing.temperatures.clamp(min=MIN_TEMPERATURE),
        drawing.top_k,
        drawing.top_p,
        drawing.min_p,
        drawing.numbers,
        drawn,
        scores.shape[1],
        BLOCK=_DRAW_BLOCK,
        num_warps=_DRAW_WARPS,
        enable_fp_fusion=True,
    )
    return drawn
