"""Sampling where the logits are: a batch at a time, without waiting for the device.

The same function as the reference (`.sampler`), in the same order; only float32 rounding of a
penalty or a weight may differ by a bit. The one decision behind it: everything that decides which
operations run (a penalty, a mask, a draw) is known on the host, so the device is never asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from serve.kernels.device import Drawing, Rules, SamplingKernels
from serve.kernels.device_draw import best_scores
from serve.messages import TopLogprobs

from .cuda_tables import DeviceTables
from .cuda_transfer import upload
from .sampler import NOT_FINITE, NOTHING_ALLOWED
from .sampling_table import Int32s, SamplingTable

_FINE, _NOT_FINITE, _NOTHING_ALLOWED = 0, 1, 2
_ERRORS = {_NOT_FINITE: NOT_FINITE, _NOTHING_ALLOWED: NOTHING_ALLOWED}
_COLUMNS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "number",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


@dataclass(frozen=True, slots=True)
class DeviceSamples:
    """A batch of samples on the device: what the host asks of it and how to read it.

    `statuses` say by row whether its token is void. Of the rows in `logprob_rows`, `logprobs` has
    the token's first and those of `top_ids` after it.
    """

    token_ids: Tensor  # int64 [num_rows]
    statuses: Tensor  # int32 [num_rows]
    logprob_rows: list[int]
    num_logprobs: list[int]
    top_ids: Tensor | None = None  # int64 [num_logprob_rows, num_top]
    logprobs: Tensor | None = None  # float64 [num_logprob_rows, 1 + num_top]

    def tensors(self) -> list[Tensor]:
        """What the host needs."""
        found = [self.token_ids, self.statuses]
        if self.top_ids is not None and self.logprobs is not None:
            found += [self.top_ids, self.logprobs]
        return found

    def read_errors(self, statuses: np.ndarray) -> dict[int, str]:
        """Errors by row, of the statuses on the host."""
        return {int(row): _ERRORS[int(statuses[row])] for row in np.flatnonzero(statuses)}

    def read_logprobs(self, top_ids: np.ndarray, logprobs: np.ndarray) -> dict[int, TopLogprobs]:
        """Logprobs by row, of the tensors on the host."""
        return {
            row: TopLogprobs(float(values[0]), ids[:num].tolist(), values[1 : 1 + num].tolist())
            for row, num, ids, values in zip(
                self.logprob_rows, self.num_logprobs, top_ids, logprobs, strict=True
            )
        }


class DeviceSampler:
    """Samples one token a row.

    Args:
        kernels: for the device of the logits.
        sampling: the host's parameters by slot.
        tables: the device's counts by slot.
        num_ids: ids from here on are padding and never sampled.
        device: where the logits are.
    """

    def __init__(
        self,
        kernels: SamplingKernels,
        *,
        sampling: SamplingTable,
        tables: DeviceTables,
        num_ids: int,
        device: torch.device,
    ) -> None:
        self._kernels = kernels
        self._sampling = sampling
        self._tables = tables
        self._num_ids = num_ids
        self._device = device
        # As long as a grammar's, so that the first of those compiles nothing anew.
        self._no_mask = np.zeros(-(-tables.counts.shape[1] // 32), np.int32)

    def sample(
        self, logits: Tensor, slots: Int32s, masks: Mapping[int, np.ndarray]
    ) -> DeviceSamples:
        """A token for each row of `logits` [num_rows, vocab_size], whose slots are given.

        `masks` hold the ids that a grammar allows, by slot; see `serve.runner.sampler`.
        """
        rows = self._sampling.rows(slots, {})
        columns = upload(
            np.stack([rows[name].astype(np.float64) for name in _COLUMNS]), self._device
        )
        raw = logits[:, : self._num_ids]
        scores = self._scores(raw, rows, slots, masks, columns[5:])
        best, token_ids = scores.max(dim=-1)
        statuses = torch.where(best == -torch.inf, _NOTHING_ALLOWED, _FINE)
        raw_best = best if scores is raw else raw.amax(dim=-1)
        statuses = torch.where(raw_best.isfinite(), statuses, _NOT_FINITE)
        if (rows["temperature"] > 0).any():
            drawn = self._kernels.draw(scores, _drawing(columns))
            token_ids = torch.where(columns[0] > 0, drawn, token_ids)
        token_ids = token_ids.masked_fill(statuses != _FINE, 0)
        return self._samples(raw, raw_best, token_ids, statuses.int(), rows["num_logprobs"])

    def warm_up(self, num_rows: int, vocab_size: int) -> None:
        """Sample rows of zeros in every way: what compiles has compiled, and as many fit."""
        logits = torch.zeros(num_rows, vocab_size, device=self._device)
        zeros = torch.zeros(num_rows, dtype=torch.int32, device=self._device)
        rules = Rules(
            slots=zeros,
            penalties=torch.ones(num_rows, 3, device=self._device),
            is_in_prompt=self._tables.is_in_prompt,
            counts=self._tables.counts,
            mask_rows=zeros,
            masks=upload(self._no_mask[None], self._device),
        )
        scores = self._kernels.adjust(logits, rules, self._num_ids)
        columns = torch.ones(8, num_rows, dtype=torch.float64, device=self._device)
        self._kernels.draw(scores, _drawing(columns))

    def _scores(
        self,
        raw: Tensor,
        rows: np.ndarray,
        slots: Int32s,
        masks: Mapping[int, np.ndarray],
        penalties: Tensor,
    ) -> Tensor:
        """Logits of the real ids after penalties, masks and biases; `raw` where there are none.

        Rows without penalties have factors that change nothing, whatever their slot counted.
        """
        mask_rows = np.full(len(slots), -1, np.int32)
        found: list[np.ndarray] = []
        for row, slot in enumerate(slots.tolist()):
            mask = masks.get(slot)
            if mask is not None:
                mask_rows[row] = len(found)
                found.append(mask.view(np.int32))
        scores = raw
        if found or self._sampling.has_penalties[slots].any():
            rules = Rules(
                slots=upload(slots, self._device),
                penalties=penalties.t().float().contiguous(),
                is_in_prompt=self._tables.is_in_prompt,
                counts=self._tables.counts,
                mask_rows=upload(mask_rows, self._device),
                masks=upload(np.stack(found or [self._no_mask]), self._device),
            )
            scores = self._kernels.adjust(raw, rules, self._num_ids)
        return self._biased(scores, raw, rows, slots, mask_rows)

    def _biased(
        self,
        scores: Tensor,
        raw: Tensor,
        rows: np.ndarray,
        slots: Int32s,
        mask_rows: np.ndarray,
    ) -> Tensor:
        """Scores with `logit_bias`, and without the ids that `min_tokens` holds back."""
        places: list[np.ndarray] = []
        values: list[np.ndarray] = []
        for row, slot in enumerate(slots.tolist()):
            ids = self._sampling.ids[slot]
            if ids is None:
                continue
            if len(ids.bias_ids):
                places.append(ids.bias_ids + row * self._num_ids)
                values.append(ids.biases)
            if mask_rows[row] < 0 and rows["num_held_back_ids"][row]:
                places.append(ids.held_back_ids + row * self._num_ids)
                values.append(np.full(len(ids.held_back_ids), -np.inf, np.float32))
        if not places:
            return scores
        if scores is raw:
            scores = scores.clone(memory_format=torch.contiguous_format)
        where = upload(np.concatenate(places).astype(np.int64), self._device)
        scores.view(-1).index_add_(0, where, upload(np.concatenate(values), self._device))
        return scores

    def _samples(
        self,
        raw: Tensor,
        raw_best: Tensor,
        token_ids: Tensor,
        statuses: Tensor,
        num_logprobs: np.ndarray,
    ) -> DeviceSamples:
        """With the model's own logprobs of the rows that ask for them."""
        wanted = np.flatnonzero(num_logprobs >= 0)
        counts = num_logprobs[wanted].tolist()
        if not len(wanted):
            return DeviceSamples(token_ids, statuses, [], [])
        where = upload(wanted, self._device)
        rows, best = raw.index_select(0, where), raw_best.index_select(0, where).unsqueeze(1)
        total = (rows - best).exp().sum(-1, keepdim=True, dtype=torch.float64).log() + best.double()
        top, top_ids = best_scores(rows)
        num_top = min(max(counts), top.shape[1])
        own = rows.gather(1, token_ids.index_select(0, where).unsqueeze(1))
        logprobs = torch.cat((own, top[:, :num_top]), dim=1).double() - total
        return DeviceSamples(
            token_ids, statuses, wanted.tolist(), counts, top_ids[:, :num_top], logprobs
        )


def _drawing(columns: Tensor) -> Drawing:
    temperature, top_k, top_p, min_p, number = columns[:5]
    return Drawing(
        temperatures=temperature.float(),
        top_k=top_k.long(),
        top_p=top_p.contiguous(),
        min_p=min_p.float(),
        numbers=number.contiguous(),
    )
