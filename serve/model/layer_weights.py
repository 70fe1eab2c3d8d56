"""What one decoder layer holds on a rank, and where it lies in the checkpoint.

Not its arithmetic: the reference and the one for GPUs compute with the same parts in their own way.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from serve.catalog import ModelShape

from .linears import GateUpLinear, QKVLinear, RowLinear
from .norm import RMSNorm
from .tensor_parallel import Collectives
from .weights import Cut


class LayerWeights:
    """Norms and projections of layer `index`, this rank's part; empty until its cuts are loaded."""

    def __init__(
        self, shape: ModelShape, collectives: Collectives, *, index: int, dtype: torch.dtype
    ) -> None:
        self._index = index
        self._input_norm = RMSNorm(shape)
        self._qkv = QKVLinear(shape, collectives, dtype=dtype)
        q_size = shape.num_heads * shape.head_dim
        self._output = RowLinear(q_size, shape.hidden, collectives=collectives, dtype=dtype)
        self._ffn_norm = RMSNorm(shape)
        self._gate_up = GateUpLinear(shape, collectives, dtype=dtype)
        self._down = RowLinear(shape.ffn, shape.hidden, collectives=collectives, dtype=dtype)

    def cuts(self) -> Iterator[Cut]:
        """This rank's part of the layer's tensors."""
        prefix = f"model.layers.{self._index}"
        yield from self._input_norm.cuts(f"{prefix}.input_layernorm")
        yield from self._qkv.cuts(f"{prefix}.self_attn")
        yield from self._output.cuts(f"{prefix}.self_attn.o_proj")
        yield from self._ffn_norm.cuts(f"{prefix}.post_attention_layernorm")
        yield from self._gate_up.cuts(f"{prefix}.mlp")
        yield from self._down.cuts(f"{prefix}.mlp.down_proj")
