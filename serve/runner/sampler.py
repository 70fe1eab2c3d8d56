"""Logits to tokens: a pure function of (a row of logits, its parameters, seed, position).

The reference of `serve.kernels.native_sampling`. Not random and not batched: a row is sampled from
its own numbers alone, in a fixed order of arithmetic, so no neighbour can change a bit of it. The
one decision: one uniform number per position goes through the inverse of the cumulative
distribution over ids sorted by (probability descending, id ascending), and only as many ids are
sorted as the draw needs.

The order, as in Hugging Face and vLLM::

    repetition, presence, frequency penalty -> logit_bias
    -> mask (grammar, else min_tokens; ids that are padding always)
    -> temperature -> top_k -> top_p -> min_p -> draw

Logprobs are those of the model: before penalties, masks and temperature (vLLM's "raw_logprobs").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from serve.messages import SamplingParams, TopLogprobs
from serve.seeds import uniform

from .sampling_table import MIN_TEMPERATURE, has_penalty

_NUM_FIRST_CANDIDATES = 256
_GROUP_SIZE = 64
_NEG_INF = np.float32(-np.inf)

NOT_FINITE = "The model's logits are not finite"
NOTHING_ALLOWED = "No token is allowed here"

_Row = np.ndarray[tuple[int], np.dtype[np.float32]]
_Ids = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(slots=True)
class SamplingRow:
    """How a row of logits is sampled: its sequence's parameters and all its tokens.

    `mask` holds the ids that a grammar allows: uint32, bit i % 32 of word i // 32.
    """

    sampling: SamplingParams
    prompt_token_ids: Sequence[int] | np.ndarray
    output_token_ids: Sequence[int] | np.ndarray
    mask: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """What a row gave; with an `error` the token is void."""

    token_id: int
    logprobs: TopLogprobs | None = None
    error: str | None = None


class Sampler:
    """Samples one token a row. `eos_token_ids` are held back until `min_tokens`."""

    def __init__(
        self, *, vocab_size: int, num_real_tokens: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        assert num_real_tokens <= vocab_size
        self._num_ids = num_real_tokens
        self._eos_token_ids = eos_token_ids
        self._scratch = np.empty(num_real_tokens, dtype=np.float32)

    def sample(self, logits: np.ndarray, rows: Sequence[SamplingRow]) -> list[Sample]:
        """A sample for each row of `logits`, float32 [num_rows, >= num_real_tokens].

        `logits` is left as it was. A row whose largest logit is not finite gets an error.
        """
        return [
            self._sample_row(line[: self._num_ids], row)
            for line, row in zip(logits, rows, strict=True)
        ]

    def _sample_row(self, raw: _Row, row: SamplingRow) -> Sample:
        if not np.isfinite(raw.max()):
            return Sample(0, error=NOT_FINITE)
        scores = self._adjust(raw, row)
        if scores.max() == _NEG_INF:
            return Sample(0, error=NOTHING_ALLOWED)
        sampling = row.sampling
        if sampling.temperature < MIN_TEMPERATURE:
            token_id = int(scores.argmax())
        else:
            position = len(row.output_token_ids)
            token_id = _draw(scores, sampling, uniform(sampling.seed, position))
        if sampling.logprobs is None:
            return Sample(token_id)
        return Sample(token_id, _logprobs(raw, token_id, sampling.logprobs))

    def _adjust(self, raw: _Row, row: SamplingRow) -> _Row:
        """Logits after penalties, bias and masks; `raw` itself where there are none."""
        sampling, mask = row.sampling, row.mask
        held_back: tuple[int, ...] = ()
        if mask is None and len(row.output_token_ids) < sampling.min_tokens:
            held_back = (*self._eos_token_ids, *sampling.stop_token_ids)
        is_penalized = has_penalty(sampling)
        if mask is None and not held_back and not sampling.logit_bias and not is_penalized:
            return raw
        scores = self._scratch
        np.copyto(scores, raw)
        if is_penalized:
            _penalize(scores, row)
        for token_id, bias in sampling.logit_bias.items():
            if token_id < self._num_ids:
                scores[token_id] += np.float32(bias)
        if mask is not None:
            allowed = np.unpackbits(mask.view(np.uint8), count=self._num_ids, bitorder="little")
            np.copyto(scores, _NEG_INF, where=allowed == 0)
        for token_id in held_back:
            if token_id < self._num_ids:
                scores[token_id] = _NEG_INF
        return scores


def _penalize(scores: _Row, row: SamplingRow) -> None:
    """Repetition over prompt and output (Hugging Face), the others over output only (OpenAI)."""
    sampling = row.sampling
    output_ids, counts = np.unique(
        np.array(row.output_token_ids, dtype=np.int64), return_counts=True
    )
    if sampling.repetition_penalty != 1.0:
        penalty = np.float32(sampling.repetition_penalty)
        seen = np.union1d(np.array(row.prompt_token_ids, dtype=np.int64), output_ids)
        before = scores[seen]
        scores[seen] = np.where(before > 0, before / penalty, before * penalty)
    frequency = counts.astype(np.float32) * np.float32(sampling.frequency_penalty)
    scores[output_ids] -= frequency + np.float32(sampling.presence_penalty)


def _draw(scores: _Row, sampling: SamplingParams, number: float) -> int:
    """The id at `number`, in [0, 1), of the filtered distribution's cumulative sum.

    Weights are relative to the best id's, which is 1. Where the sorted head of the distribution
    does not settle the draw, a longer head does.
    """
    num_wanted = sampling.top_k or _NUM_FIRST_CANDIDATES
    best = scores.max()
    total = 0.0
    if not sampling.top_k:
        total = float(_weigh(scores, best, sampling).sum(dtype=np.float64))
    while True:
        ids, is_all = _best_ids(scores, num_wanted)
        if sampling.top_k:
            ids = ids[: sampling.top_k]
        weights = _weigh(scores[ids], best, sampling)
        cumulative = weights.cumsum(dtype=np.float64)
        if sampling.top_k:
            total = float(cumulative[-1])
        num_kept = _num_kept(weights, cumulative, total, sampling)
        if num_kept < len(ids):
            total = float(cumulative[num_kept - 1])
        is_settled = num_kept < len(ids) or sampling.top_k > 0 or is_all
        has_no_cut = sampling.top_p >= 1.0 and sampling.min_p <= 0.0
        if is_settled or (has_no_cut and number * total < cumulative[-1]):
            place = int(np.searchsorted(cumulative[:num_kept], number * total, side="right"))
            return int(ids[min(place, num_kept - 1)])
        num_wanted *= 8


def _weigh(scores: _Row, best: np.float32, sampling: SamplingParams) -> _Row:
    """exp((scores - best) / temperature), in float32."""
    with np.errstate(over="ignore"):
        weights: _Row = np.exp((scores - best) / np.float32(sampling.temperature))
    return weights


def _num_kept(
    weights: _Row,
    cumulative: np.ndarray[tuple[int], np.dtype[np.float64]],
    total: float,
    sampling: SamplingParams,
) -> int:
    """How many of the sorted ids top_p and min_p keep: at least one, all where neither cuts."""
    num_kept = len(weights)
    if sampling.top_p < 1.0:
        # The id that crosses top_p is kept.
        crossing = int(np.searchsorted(cumulative, sampling.top_p * total, side="left"))
        num_kept = min(num_kept, crossing + 1)
    if sampling.min_p > 0.0:
        num_likely = int(np.count_nonzero(weights >= np.float32(sampling.min_p)))
        num_kept = min(num_kept, max(num_likely, 1))
    return num_kept


def _best_ids(scores: _Row, num_wanted: int) -> tuple[_Ids, bool]:
    """The best ids in order, at least `num_wanted` where there are, and whether they are all.

    `num_wanted` groups of ids have a best score of at least the `num_wanted`-th best group's, so
    at least as many ids do: a bound that costs one pass, and whatever is above it is sorted.
    """
    bound = _NEG_INF
    num_groups = len(scores) // _GROUP_SIZE
    if num_wanted < num_groups:
        groups = scores[: num_groups * _GROUP_SIZE].reshape(num_groups, _GROUP_SIZE).max(axis=1)
        bound = np.partition(groups, num_groups - num_wanted)[num_groups - num_wanted]
    is_all = bool(bound == _NEG_INF)
    ids = np.flatnonzero(scores > _NEG_INF if is_all else scores >= bound)
    return ids[np.argsort(-scores[ids], kind="stable")], is_all


def _logprobs(raw: _Row, token_id: int, num_top: int) -> TopLogprobs:
    best = raw.max()
    log_total = float(best) + float(np.log(np.exp(raw - best).sum(dtype=np.float64)))
    top_ids = _best_ids(raw, num_top)[0][:num_top] if num_top else np.empty(0, dtype=np.int64)
    return TopLogprobs(
        float(raw[token_id]) - log_total,
        top_ids.tolist(),
        [float(raw[top_id]) - log_total for top_id in top_ids],
    )
