"""From a step's logits to its tokens: the reference, row by row, and the native one.

Not the arithmetic (`.sampler`, `serve.kernels.native_sampling`): what each of them reads of the
tables that the runner keeps by slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from serve.kernels import native_sampling
from serve.kernels.native import Pool
from serve.messages import TopLogprobs

from .batch import SequenceTable
from .sampler import NOT_FINITE, NOTHING_ALLOWED, Sampler, SamplingRow
from .sampling_table import SamplingTable

Logits = npt.NDArray[np.float32]  # [num_sampled, at least the real ids]


_ERRORS = {
    native_sampling.NOT_FINITE: NOT_FINITE,
    native_sampling.NOTHING_ALLOWED: NOTHING_ALLOWED,
}


@dataclass(slots=True)
class Samples:
    """One token a row; `errors` and `logprobs` by row, where there are any."""

    token_ids: npt.NDArray[np.int32]
    errors: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, TopLogprobs] = field(default_factory=dict)


class StepSampler(Protocol):
    """Samples the rows of one step."""

    def sample(
        self, logits: Logits, slots: npt.NDArray[np.int32], masks: Mapping[int, np.ndarray]
    ) -> Samples:
        """Sample row i for the sequence in slot `slots[i]`; `masks` by slot."""
        ...


class ReferenceSampler:
    """A `StepSampler` that gives `Sampler` each sequence's tokens anew, nothing counted ahead."""

    def __init__(
        self, sampler: Sampler, *, sequences: SequenceTable, sampling: SamplingTable
    ) -> None:
        self._sampler = sampler
        self._sequences = sequences
        self._sampling = sampling

    def sample(
        self, logits: Logits, slots: npt.NDArray[np.int32], masks: Mapping[int, np.ndarray]
    ) -> Samples:
        """See `StepSampler.sample`."""
        rows = [self._row(slot, masks.get(slot)) for slot in slots.tolist()]
        found = self._sampler.sample(logits, rows)
        samples = Samples(np.array([sample.token_id for sample in found], np.int32))
        for row, sample in enumerate(found):
            if sample.error is not None:
                samples.errors[row] = sample.error
            if sample.logprobs is not None:
                samples.logprobs[row] = sample.logprobs
        return samples

    def _row(self, slot: int, mask: np.ndarray | None) -> SamplingRow:
        sequences = self._sequences
        token_ids = sequences.token_ids[slot, : sequences.num_tokens[slot]]
        prompt_ids, output_ids = np.split(token_ids, [sequences.num_prompt_tokens[slot]])
        params = self._sampling.params[slot]
        assert params is not None
        return SamplingRow(params, prompt_ids, output_ids, mask)


class NativeSampler:
    """A `StepSampler` in C++, of all rows at once."""

    def __init__(self, pool: Pool, sampling: SamplingTable, *, num_ids: int) -> None:
        self._pool = pool
        self._sampling = sampling
        self._num_ids = num_ids

    def sample(
        self, logits: Logits, slots: npt.NDArray[np.int32], masks: Mapping[int, np.ndarray]
    ) -> Samples:
        """See `StepSampler.sample`."""
        rows = self._sampling.rows(slots, masks)
        found = native_sampling.sample(self._pool, logits, rows, num_ids=self._num_ids)
        samples = Samples(found.token_ids)
        for row in np.flatnonzero(found.errors).tolist():
            samples.errors[row] = _ERRORS[int(found.errors[row])]
        for row in np.flatnonzero((rows["num_logprobs"] >= 0) & (found.errors == 0)).tolist():
            top_ids = found.top_ids[row, : int(rows["num_logprobs"][row])]
            num_top = int(np.count_nonzero(top_ids >= 0))
            samples.logprobs[row] = TopLogprobs(
                float(found.logprobs[row]),
                top_ids[:num_top].tolist(),
                found.top_logprobs[row, :num_top].tolist(),
            )
        return samples
