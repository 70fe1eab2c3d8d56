"""How each running sequence samples, by slot, in the form that the native sampler reads.

Not the sampling itself. The one decision behind it: a slot's row is written once, when its sequence
arrives, and a step copies the rows that it samples in one numpy call; only sequences with penalties
cost work in Python a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from serve.kernels.native_sampling import SAMPLING_DTYPE
from serve.messages import NewSequence, SamplingParams, StepInput
from serve.seeds import uniforms

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]

MIN_TEMPERATURE = 1e-5  # below it the distribution is one token: the best
_MAX_INT32 = 2**31 - 1
_NO_IDS = np.empty(0, np.int32)


@dataclass(slots=True)
class TokenIds:
    """The ids that one slot's row points to.

    `output_ids` and `output_counts` grow by doubling; their first `num_output_ids` entries count.
    Kept for sequences with penalties alone; empty for others.
    """

    prompt_ids: Int32s = field(default_factory=_NO_IDS.copy)  # distinct
    output_ids: Int32s = field(default_factory=lambda: np.zeros(16, np.int32))  # distinct
    output_counts: Int32s = field(default_factory=lambda: np.zeros(16, np.int32))
    bias_ids: Int32s = field(default_factory=_NO_IDS.copy)
    biases: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    held_back_ids: Int32s = field(default_factory=_NO_IDS.copy)
    places: dict[int, int] = field(default_factory=dict)

    @property
    def num_output_ids(self) -> int:
        """Distinct ids of the output so far."""
        return len(self.places)

    def count(self, token_id: int) -> bool:
        """One more token of the output; True where the memory of the ids moved."""
        place = self.places.setdefault(token_id, len(self.places))
        has_moved = place == len(self.output_ids)
        if has_moved:
            self.output_ids = np.concatenate((self.output_ids, np.zeros_like(self.output_ids)))
            self.output_counts = np.concatenate(
                (self.output_counts, np.zeros_like(self.output_counts))
            )
        self.output_ids[place] = token_id
        self.output_counts[place] += 1
        return has_moved


class SamplingTable:
    """Sampling parameters of the running sequences and what their penalties count.

    Args:
        max_slots: sequences that may run at once.
        num_ids: ids from here on are padding, never sampled and never looked up.
        eos_token_ids: held back until a request's `min_tokens`.
    """

    def __init__(self, *, max_slots: int, num_ids: int, eos_token_ids: tuple[int, ...]) -> None:
        self._num_ids = num_ids
        self._eos_token_ids = eos_token_ids
        self._static = np.zeros(max_slots, SAMPLING_DTYPE)
        self._num_output_ids = self._static["num_output_ids"]
        self._seeds = np.zeros(max_slots, np.uint64)
        self._min_tokens = np.zeros(max_slots, np.int64)
        self.num_output_tokens = np.zeros(max_slots, np.int64)
        """By slot; the position that the next token takes."""
        self.has_penalties = np.zeros(max_slots, np.bool_)
        self.params: list[SamplingParams | None] = [None] * max_slots
        self.ids: list[TokenIds | None] = [None] * max_slots
        """By slot, for sequences with penalties, biases or `min_tokens`."""

    def advance(self, step: StepInput) -> None:
        """Take over a step's changes; its decodes' tokens are counted by `count`."""
        for slot in step.released:
            self.params[slot] = self.ids[slot] = None
            self.has_penalties[slot] = False
        for new in step.new:
            self._meet(new)
        self.num_output_tokens[np.frombuffer(step.decodes, np.int32)] += 1

    def count(self, slots: Int32s, token_ids: Int64s) -> None:
        """Add one output token to each of `slots`; a slot without penalties needs none."""
        for index in np.flatnonzero(self.has_penalties[slots]).tolist():
            slot = int(slots[index])
            ids = self.ids[slot]
            assert ids is not None
            if token_ids[index] < self._num_ids and ids.count(int(token_ids[index])):
                self._point(slot, ids)
            self._num_output_ids[slot] = ids.num_output_ids

    def rows(self, slots: Int32s, masks: Mapping[int, np.ndarray]) -> np.ndarray:
        """SAMPLING_DTYPE [len(slots)]: how each of `slots` samples its next token.

        The rows hold addresses into this table and into `masks` (by slot, uint32, contiguous); use
        them before the next step begins.
        """
        rows = self._static[slots]
        positions = self.num_output_tokens[slots]
        rows["number"] = uniforms(self._seeds[slots], positions)
        if masks:
            rows["mask"] = [_address(masks.get(slot)) for slot in slots.tolist()]
        is_free = (rows["mask"] != 0) | (positions >= self._min_tokens[slots])
        rows["num_held_back_ids"][is_free] = 0
        return rows

    def _meet(self, new: NewSequence) -> None:
        slot, params = new.slot, new.sampling
        self.params[slot] = params
        self._seeds[slot] = params.seed & (2**64 - 1)
        self._min_tokens[slot] = params.min_tokens
        self.num_output_tokens[slot] = len(new.token_ids) - new.num_prompt_tokens
        self.has_penalties[slot] = has_penalty(params)
        row = np.zeros((), SAMPLING_DTYPE)
        row["temperature"] = 0 if params.temperature < MIN_TEMPERATURE else params.temperature
        row["top_p"], row["min_p"] = params.top_p, params.min_p
        row["top_k"] = min(params.top_k, _MAX_INT32)
        row["repetition_penalty"] = params.repetition_penalty
        row["presence_penalty"] = params.presence_penalty
        row["frequency_penalty"] = params.frequency_penalty
        row["num_logprobs"] = -1 if params.logprobs is None else params.logprobs
        self._static[slot] = row
        self.ids[slot] = None
        if self.has_penalties[slot] or params.logit_bias or params.min_tokens:
            ids = self.ids[slot] = self._token_ids(new)
            self._point(slot, ids)

    def _token_ids(self, new: NewSequence) -> TokenIds:
        params = new.sampling
        ids = TokenIds()
        if has_penalty(params):
            ids.prompt_ids = self._real(np.unique(new.token_ids[: new.num_prompt_tokens]))
            for token_id in new.token_ids[new.num_prompt_tokens :]:
                if token_id < self._num_ids:
                    ids.count(token_id)
        biases = {i: bias for i, bias in params.logit_bias.items() if i < self._num_ids}
        ids.bias_ids = np.array(list(biases), np.int32)
        ids.biases = np.array(list(biases.values()), np.float32)
        if params.min_tokens:
            ids.held_back_ids = self._real(
                np.unique((*self._eos_token_ids, *params.stop_token_ids))
            )
        return ids

    def _real(self, ids: npt.NDArray[np.generic]) -> Int32s:
        real = ids.astype(np.int64)
        return real[real < self._num_ids].astype(np.int32)

    def _point(self, slot: int, ids: TokenIds) -> None:
        """Write where the slot's ids lie now."""
        row = self._static[slot]
        for name in ("prompt_ids", "output_ids", "bias_ids", "held_back_ids"):
            row[name] = _address(getattr(ids, name))
        row["output_counts"], row["biases"] = _address(ids.output_counts), _address(ids.biases)
        row["num_prompt_ids"], row["num_biases"] = len(ids.prompt_ids), len(ids.biases)
        row["num_output_ids"] = ids.num_output_ids
        row["num_held_back_ids"] = len(ids.held_back_ids)


def has_penalty(params: SamplingParams) -> bool:
    """Whether tokens so far change the logits."""
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _address(array: np.ndarray | None) -> int:
    if array is None or not array.size:
        return 0
    assert array.flags.c_contiguous
    return int(array.ctypes.data)
