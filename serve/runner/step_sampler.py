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

from serve.messages import TopLogprobs

from .batch import SequenceTable
from .sampler import Sampler, SamplingRow
from .sampling_table import SamplingTable

Logits = npt.NDArray[np.float32]  # [num_sampled, at least the real ids]


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
