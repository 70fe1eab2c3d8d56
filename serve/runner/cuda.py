"""One rank's heartbeat on a device: a step is launched, sampled on the device, and read when asked.

The counterpart of `.model_runner`, for a device that runs beside the host. The one decision behind
it: nothing waits for the device but `result`, and the next step's tokens never leave it, so the
engine can be one step behind while the device always has work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from serve.messages import FinishedOutput, StepInput, StepOutput
from serve.model.tensor_parallel import Collectives

from .batch import Batch, SequenceTable
from .cuda_pass import CudaPass
from .cuda_sampler import DeviceSampler, DeviceSamples
from .cuda_tables import DeviceTables
from .cuda_transfer import Download, upload
from .model_runner import RunnerFacts
from .sampling_table import SamplingTable


@dataclass(frozen=True, slots=True)
class PendingSamples:
    """A step's samples, still on the device or on their way."""

    step_id: int
    samples: DeviceSamples
    download: Download

    def result(self) -> StepOutput:
        """Wait for the device.

        Raises:
            CollectiveError: a rank is gone.
        """
        token_ids, statuses, *logprobs = self.download.wait()
        return StepOutput(
            self.step_id,
            token_ids.tolist(),
            self.samples.read_errors(statuses),
            self.samples.read_logprobs(*logprobs) if logprobs else {},
        )


class CudaRunner:
    """Runs steps on one rank's part of a loaded model.

    Args:
        forward: the model's pass.
        sampler: asked on rank 0 only.
        collectives: this rank's view of its group, on tensors of the device.
        check_group: raises where the group is broken; None for a group of one.
        sequences: the host's tokens and blocks by slot.
        sampling: parameters by slot.
        tables: the device's copy by slot.
        facts: what is loaded.
        device: where to run.
    """

    def __init__(
        self,
        forward: CudaPass,
        sampler: DeviceSampler,
        *,
        collectives: Collectives,
        check_group: Callable[[], None] | None,
        sequences: SequenceTable,
        sampling: SamplingTable,
        tables: DeviceTables,
        facts: RunnerFacts,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._sampler = sampler
        self._collectives = collectives
        self._check_group = check_group
        self._sequences = sequences
        self._sampling = sampling
        self._tables = tables
        self._device = device
        self._begun: tuple[Batch, Tensor | None] | None = None
        self._step_id = 0
        self.facts = facts

    @torch.inference_mode()
    def start(self, step: StepInput) -> None:
        """Take over a step's changes and launch its pass; see `serve.messages.StepInput`.

        Every `start` is followed by one `sample` before the next.

        Raises:
            CollectiveError: a rank is gone.
        """
        assert self._begun is None, "the step before was not sampled"
        if self._check_group is not None:
            self._check_group()
        self._step_id = step.step_id
        self._sampling.advance(step)
        self._tables.advance(step, self._sampling)
        batch = self._sequences.advance(step)
        if batch is not None:
            self._begun = (batch, self._forward.run(batch))

    @torch.inference_mode()
    def sample(self, masks: Mapping[int, np.ndarray]) -> PendingSamples | FinishedOutput:
        """Launch the sampling of the step's rows.

        Args:
            masks: by slot, the ids that a grammar allows (uint32, bit i % 32 of word i // 32);
                rank 0 only.

        Returns:
            The samples to come on rank 0; no tokens on other ranks.

        Raises:
            CollectiveError: a rank is gone.
        """
        begun, self._begun = self._begun, None
        if begun is None or not len(begun[0].sampled_slots):
            return FinishedOutput(StepOutput(self._step_id, []))
        batch, logits = begun
        samples = None
        if logits is not None:
            samples = self._sampler.sample(logits, batch.sampled_slots, masks)
        self._keep(batch, None if samples is None else samples.token_ids)
        if samples is None:
            return FinishedOutput(StepOutput(self._step_id, []))
        download = Download(samples.tensors(), self._check_group)
        return PendingSamples(self._step_id, samples, download)

    def _keep(self, batch: Batch, token_ids: Tensor | None) -> None:
        """The next step's own tokens, on every rank: those of rank 0."""
        slots = upload(batch.sampled_slots.astype(np.int64), self._device)
        if self._collectives.size > 1:
            # Ids are exact in float32 below 2**24, which no vocabulary reaches.
            mine = torch.zeros(len(slots), device=self._device)
            if token_ids is not None:
                mine.copy_(token_ids)
            token_ids = self._collectives.all_reduce(mine).long()
        assert token_ids is not None
        self._tables.last_token_ids.index_copy_(0, slots, token_ids)
