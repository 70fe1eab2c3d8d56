"""One rank's heartbeat: a step's changes in, the model's pass, sampled tokens out of rank 0.

Not an engine: it schedules nothing and remembers only what steps told it. Every rank runs the same
steps in the same order; they meet in the model's collectives.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from serve.attention.protocol import AttentionBackend
from serve.messages import StepInput, StepOutput
from serve.model.qwen2 import Qwen2Model

from .batch import SequenceTable
from .sampler import Sampler


class ModelRunner:
    """Runs steps on one rank's part of a loaded model.

    Args:
        model: loaded.
        attention: over this rank's KV pool.
        sampler: asked on rank 0 only.
        block_size: KV slots of a block.
        num_total_blocks: blocks of the pool, the same on every rank.
        max_model_len: tokens that a sequence may reach.
        vocab_size: columns of the logits.
        num_weight_bytes: memory of this rank's weights.
        num_read_bytes: bytes of the checkpoint that this rank read.
    """

    def __init__(
        self,
        model: Qwen2Model,
        attention: AttentionBackend,
        *,
        sampler: Sampler,
        block_size: int,
        num_total_blocks: int,
        max_model_len: int,
        vocab_size: int,
        num_weight_bytes: int,
        num_read_bytes: int,
    ) -> None:
        self._model = model
        self._attention = attention
        self._sampler = sampler
        self._sequences = SequenceTable(block_size=block_size)
        self.num_total_blocks = num_total_blocks
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.num_weight_bytes = num_weight_bytes
        self.num_read_bytes = num_read_bytes

    def execute(self, step: StepInput, masks: Mapping[int, np.ndarray]) -> StepOutput | None:
        """Run one step; see `serve.messages.StepInput` for the order on arrival.

        Args:
            step: what changes and what runs.
            masks: by sequence id, the ids that a grammar allows (uint32, bit i % 32 of word
                i // 32); rank 0 only.

        Returns:
            The sampled tokens on rank 0, None on other ranks.

        Raises:
            CollectiveError: a rank is gone.
        """
        batch = self._sequences.advance(step)
        if batch is None:
            return StepOutput(step.step_id, [])
        with torch.inference_mode():
            attention = self._attention.plan(batch.spans)
            hidden = self._model.forward(batch.token_ids, batch.positions, attention)
            if not batch.sampling:
                return StepOutput(step.step_id, [])
            logits = self._model.logits(hidden[batch.sampled_rows])
        if logits is None:
            return None
        return StepOutput(step.step_id, self._sampler.sample(logits, batch.sampling, masks))
