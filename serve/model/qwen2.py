"""The Qwen2 decoder, this rank's part of it.

Residual stream, norms and all sums are float32 on every rank; `dtype` is what matrices are stored
in. The model knows neither sequences nor blocks: rows, positions and an attention that was planned
for them. Architecture: Qwen2 technical report (arXiv:2407.10671), section 2.2.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from serve.attention.protocol import StepAttention
from serve.catalog import ModelShape
from serve.kernels.elementwise import rotate, silu_and_multiply

from .layer_weights import LayerWeights
from .norm import RMSNorm
from .rotary import RotaryTable
from .tensor_parallel import Collectives
from .vocabulary import VocabularyTable
from .weights import Cut


class Qwen2Model:
    """All layers of one rank; empty until its cuts are loaded.

    Args:
        shape: of the whole model.
        collectives: this rank's view of its group; the size must be legal for the shape.
        dtype: float32 or bfloat16, the type that matrices are stored in.
        num_positions: positions that a sequence may reach.
    """

    def __init__(
        self,
        shape: ModelShape,
        collectives: Collectives,
        *,
        dtype: torch.dtype,
        num_positions: int,
    ) -> None:
        self._embedding = VocabularyTable(shape, collectives, dtype=dtype)
        self._head = (
            self._embedding if shape.is_tied else VocabularyTable(shape, collectives, dtype=dtype)
        )
        self._layers = [
            DecoderLayer(shape, collectives, index=index, dtype=dtype)
            for index in range(shape.num_layers)
        ]
        self._norm = RMSNorm(shape)
        self._rotary = RotaryTable(shape, num_positions)

    def cuts(self) -> Iterator[Cut]:
        """Everything that this rank reads of the checkpoint."""
        yield from self._embedding.cuts("model.embed_tokens")
        for layer in self._layers:
            yield from layer.cuts()
        yield from self._norm.cuts("model.norm")
        if self._head is not self._embedding:
            yield from self._head.cuts("lm_head")

    def forward(self, token_ids: Tensor, positions: Tensor, attention: StepAttention) -> Tensor:
        """Last hidden states, float32 [num_tokens, hidden], before the final norm.

        Args:
            token_ids: int64 [num_tokens].
            positions: int64 [num_tokens].
            attention: planned for these rows.
        """
        cos, sin = self._rotary.at(positions)
        hidden = self._embedding.embed(token_ids)
        for layer in self._layers:
            hidden = layer(hidden, cos, sin, attention=attention)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor | None:
        """float32 [num_rows, vocab_size] on rank 0, None elsewhere; every rank must call it."""
        return self._head.logits(self._norm(hidden))


class DecoderLayer(LayerWeights):
    """Attention and FFN, each behind a norm and added to the residual stream."""

    def __call__(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, *, attention: StepAttention
    ) -> Tensor:
        """The residual stream [num_tokens, hidden] after this layer."""
        heads = self._qkv(self._input_norm(hidden))
        num_heads, num_kv_heads = self._qkv.num_heads, self._qkv.num_kv_heads
        rotated = rotate(heads[:, : num_heads + num_kv_heads], cos, sin)
        query, key = rotated[:, :num_heads], rotated[:, num_heads:]
        value = heads[:, num_heads + num_kv_heads :]
        hidden = hidden + self._output(attention.attend(self._index, query, key, value))
        inner = silu_and_multiply(self._gate_up(self._ffn_norm(hidden)))
        return hidden + self._down(inner)
