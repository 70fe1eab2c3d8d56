"""The draw from a row's best scores, in torch operations that a GPU runs without asking the host.

Not the whole draw: a row that its best scores do not settle is left to `triton_sampling`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .device import Drawing

MIN_TEMPERATURE = 1e-5
_NUM_BEST = 256


def best_scores(scores: Tensor, num_best: int = _NUM_BEST) -> tuple[Tensor, Tensor]:
    """The best scores of each row in order and their ids, equal ones by id.

    Which of the ids that share the last score are among them is left open.
    """
    num_best = min(num_best, scores.shape[1])
    ids = scores.topk(num_best, dim=-1).indices.sort(dim=-1).values
    best, order = scores.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return best, ids.gather(1, order)


def draw_from_best(scores: Tensor, drawing: Drawing) -> tuple[Tensor, Tensor]:
    """The drawn id of each row as far as its best scores settle it, and whether they do.

    A score equal to the last of the best does not count as found: others like it may be missing.
    """
    best, ids = best_scores(scores)
    num_best = best.shape[1]
    temperatures = drawing.temperatures.clamp(min=MIN_TEMPERATURE).unsqueeze(1)
    top_k, min_p = drawing.top_k.unsqueeze(1), drawing.min_p.unsqueeze(1)
    weights = ((best - best[:, :1]) / temperatures).exp()
    places = torch.arange(num_best, device=scores.device)
    weights = weights.masked_fill((top_k > 0) & (places >= top_k), 0.0)
    cumulative = weights.double().cumsum(-1)
    everything = ((scores - best[:, :1]) / temperatures).exp().sum(-1, True, dtype=torch.float64)
    total = torch.where(top_k > 0, cumulative[:, -1:], everything)
    num_kept = _num_kept(weights, cumulative, total, drawing)
    num_found = (best > best[:, -1:]).sum(-1, keepdim=True)
    if num_best == scores.shape[1]:
        num_found, num_kept = torch.full_like(num_found, num_best), num_kept.clamp(max=num_best)
    last = cumulative.gather(1, num_kept.clamp(max=num_best) - 1)
    total = torch.where(num_kept <= num_best, last, total)
    target = drawing.numbers.unsqueeze(1) * total
    place = torch.searchsorted(cumulative, target, right=True).minimum(num_kept - 1)
    is_cut = drawing.top_p.unsqueeze(1) < 1.0
    is_uncut = (top_k == 0) & ~is_cut & (min_p <= 0.0)
    is_settled = (place < num_found) & ((num_kept <= num_found) | is_uncut)
    # top_p is a share of what top_k keeps, which is not known where that is more than the best.
    is_settled &= ~(is_cut & (top_k > num_best)) | (num_best == scores.shape[1])
    is_settled |= drawing.temperatures.unsqueeze(1) < MIN_TEMPERATURE
    return ids.gather(1, place.clamp(max=num_best - 1)).squeeze(1), is_settled.squeeze(1)


def _num_kept(weights: Tensor, cumulative: Tensor, total: Tensor, drawing: Drawing) -> Tensor:
    """How many of the sorted ids the cuts keep, one more than the best where they keep more."""
    num_best = weights.shape[1]
    top_k, top_p = drawing.top_k.unsqueeze(1), drawing.top_p.unsqueeze(1)
    min_p = drawing.min_p.unsqueeze(1)
    num_kept = torch.where(top_k > 0, top_k.clamp(max=num_best + 1), num_best + 1)
    crossing = torch.searchsorted(cumulative, top_p * total) + 1
    num_kept = torch.where(top_p < 1.0, crossing.minimum(num_kept), num_kept)
    num_likely = (weights >= min_p).sum(-1, keepdim=True).clamp(min=1)
    num_likely += (num_likely == num_best).long()
    return torch.where(min_p > 0.0, num_likely.minimum(num_kept), num_kept)
