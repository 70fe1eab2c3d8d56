"""One rank's heartbeat: a step's changes in, the model's pass, sampled tokens out of rank 0.

Not an engine: it schedules nothing and remembers only what steps told it. Every rank runs the same
steps in the same order; they meet in the model's collectives. The one decision behind it: the pass
runs on a thread of its own, without the interpreter's lock where the kernels are native, so that
rank 0's engine tells one step's tokens while the next one is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from serve.messages import FinishedOutput, StepInput, StepOutput

from .batch import Batch, SequenceTable
from .sampling_table import SamplingTable
from .step_sampler import Logits, StepSampler


class ForwardPass(Protocol):
    """The model's pass over one step's rows."""

    def run(self, batch: Batch) -> Logits | None:
        """Logits of the sampled rows on rank 0, valid until the next call; None elsewhere.

        Raises:
            CollectiveError: a rank is gone.
        """
        ...


@dataclass(frozen=True, slots=True)
class RunnerFacts:
    """What a loaded runner is.

    Attributes:
        kernels: which kernels compute ("torch", "avx2", ...).
        num_total_blocks: blocks of the KV pool, the same on every rank.
        max_model_len: tokens that a sequence may reach.
        vocab_size: ids of the model, padding included.
        num_weight_bytes: memory of this rank's weights.
        num_read_bytes: bytes of the checkpoint that this rank read.
    """

    kernels: str
    num_total_blocks: int
    max_model_len: int
    vocab_size: int
    num_weight_bytes: int
    num_read_bytes: int


class ModelRunner:
    """Runs steps on one rank's part of a loaded model.

    Args:
        forward: the model's pass.
        sampler: asked on rank 0 only; reads the two tables.
        sequences: tokens and blocks by slot.
        sampling: parameters by slot.
        facts: what is loaded.
    """

    def __init__(
        self,
        forward: ForwardPass,
        sampler: StepSampler,
        *,
        sequences: SequenceTable,
        sampling: SamplingTable,
        facts: RunnerFacts,
    ) -> None:
        self._forward = forward
        self._sampler = sampler
        self._sequences = sequences
        self._sampling = sampling
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="forward")
        self._begun: tuple[Batch, Future[Logits | None]] | None = None
        self._step_id = 0
        self.facts = facts

    def start(self, step: StepInput) -> None:
        """Take over a step's changes and begin its pass; see `serve.messages.StepInput`.

        Every `start` is followed by one `sample` before the next.
        """
        assert self._begun is None, "the step before was not sampled"
        self._step_id = step.step_id
        self._sampling.advance(step)
        batch = self._sequences.advance(step)
        if batch is None:
            return
        decodes = slice(batch.num_decodes)
        self._sampling.count(batch.span_slots[decodes], batch.token_ids[decodes])
        self._begun = (batch, self._thread.submit(self._forward.run, batch))

    def sample(self, masks: Mapping[int, np.ndarray]) -> FinishedOutput:
        """Wait for the pass and sample its rows.

        Args:
            masks: by slot, the ids that a grammar allows (uint32, bit i % 32 of word i // 32);
                rank 0 only.

        Returns:
            The sampled tokens on rank 0; no tokens on other ranks.

        Raises:
            CollectiveError: a rank is gone.
        """
        begun, self._begun = self._begun, None
        logits = None if begun is None else begun[1].result()
        if begun is None or logits is None:
            return FinishedOutput(StepOutput(self._step_id, []))
        slots = begun[0].sampled_slots
        samples = self._sampler.sample(logits, slots, masks)
        self._sequences.last_token_ids[slots] = samples.token_ids
        return FinishedOutput(
            StepOutput(self._step_id, samples.token_ids.tolist(), samples.errors, samples.logprobs)
        )
