"""The reference forward pass: the decoder and paged attention in torch, on any CPU.

Not fast: what the native pass is held against, and what runs where no native kernel can.
"""

from __future__ import annotations

import numpy as np
import torch

from serve.attention.protocol import AttentionBackend, Span
from serve.model.qwen2 import Qwen2Model

from .batch import Batch
from .step_sampler import Logits


class TorchPass:
    """A `ForwardPass` over a loaded model and the attention over its KV pool."""

    def __init__(self, model: Qwen2Model, attention: AttentionBackend) -> None:
        self._model = model
        self._attention = attention

    def run(self, batch: Batch) -> Logits | None:
        """See `ForwardPass.run`."""
        with torch.inference_mode():
            attention = self._attention.plan(_spans(batch))
            hidden = self._model.forward(
                torch.from_numpy(batch.token_ids), torch.from_numpy(batch.positions), attention
            )
            if not len(batch.sampled_rows):
                return None
            logits = self._model.logits(hidden[torch.from_numpy(batch.sampled_rows)])
        return None if logits is None else logits.numpy()


def _spans(batch: Batch) -> list[Span]:
    tables = batch.block_tables[batch.span_slots].astype(np.int64)
    return [
        Span(int(span["first_row"]), int(span["num_tokens"]), int(span["first_position"]), table)
        for span, table in zip(batch.spans, tables, strict=True)
    ]
