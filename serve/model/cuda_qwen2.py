"""The Qwen2 decoder on a device: one rank's part, as few and as large kernels as it takes.

Not the reference (`.qwen2`), whose layers say what a rank reads of a checkpoint here too. Matrices
and activations have the model's dtype; the residual stream, norms and logits are float32, as in the
reference. The one decision behind it: a step of one row reads weights and nothing else, so its
products are our own kernels with everything between two products folded in; more rows go through
cuBLAS. Architecture: Qwen2 technical report (arXiv:2407.10671), section 2.2.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from serve.attention.cuda import DeviceAttention, DeviceStep
from serve.catalog import ModelShape
from serve.kernels.device import DecoderKernels

from .layer_weights import LayerWeights
from .linears import RowLinear
from .norm import RMSNorm
from .rotary_angles import rotary_angles
from .tensor_parallel import Collectives
from .vocabulary import VocabularyTable
from .weights import Cut


class CudaQwen2:
    """All layers of one rank on `device`; empty until its cuts are loaded and it is finished.

    Args:
        shape: of the whole model.
        collectives: this rank's view of its group, on tensors of `device`.
        kernels: for `device`.
        dtype: bfloat16, float16 or float32.
        num_positions: positions that a sequence may reach.
        device: where everything lies.
    """

    def __init__(
        self,
        shape: ModelShape,
        collectives: Collectives,
        kernels: DecoderKernels,
        *,
        dtype: torch.dtype,
        num_positions: int,
        device: torch.device,
    ) -> None:
        self._vocab_size = shape.vocab_size
        self._collectives = collectives
        self._kernels = kernels
        self._eps = shape.rms_norm_eps
        with device:
            self._embedding = VocabularyTable(shape, collectives, dtype=dtype)
            self._head = (
                self._embedding
                if shape.is_tied
                else VocabularyTable(shape, collectives, dtype=dtype)
            )
            self._layers = [
                DeviceLayer(shape, collectives, kernels, index=index, dtype=dtype)
                for index in range(shape.num_layers)
            ]
            self._norm = RMSNorm(shape)
        angles = torch.from_numpy(np.concatenate(rotary_angles(shape, num_positions), axis=-1))
        self._angles = angles.to(device)  # [num_positions, head_dim], cosines before sines
        self._has_wide_products = _has_wide_products(self._head.weight)

    def cuts(self) -> Iterator[Cut]:
        """Everything that this rank reads of the checkpoint."""
        yield from self._embedding.cuts("model.embed_tokens")
        for layer in self._layers:
            yield from layer.cuts()
        yield from self._norm.cuts("model.norm")
        if self._head is not self._embedding:
            yield from self._head.cuts("lm_head")

    def finish(self) -> None:
        """To be called once every cut is loaded."""
        for layer in self._layers:
            layer.finish()

    def fill_randomly(self, seed: int) -> None:
        """Weights of a benchmark, made on the device: their size is right, their text is not."""
        generator = torch.Generator(self._angles.device).manual_seed(seed)
        weights = [self._embedding.weight, *(w for one in self._layers for w in one.weights())]
        if self._head is not self._embedding:
            weights.append(self._head.weight)
        for weight in weights:
            weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
        for norm in [self._norm, *(norm for one in self._layers for norm in one.norms())]:
            norm.weight.fill_(1.0)
        self.finish()

    @property
    def num_weight_bytes(self) -> int:
        """Memory of this rank's weights."""
        return sum(cut.into.num_bytes for cut in self.cuts())

    @property
    def num_step_bytes(self) -> int:
        """Bytes of weights that a step of one row reads: all but an embedding of its own."""
        is_apart = self._head is not self._embedding
        return self.num_weight_bytes - (self._embedding.weight.nbytes if is_apart else 0)

    def forward(self, token_ids: Tensor, attention: DeviceAttention, step: DeviceStep) -> Tensor:
        """Last hidden states, float32 [num_rows, hidden], before the final norm.

        Args:
            token_ids: int64 [num_rows].
            attention: over this rank's cache.
            step: where the rows stand.
        """
        if self._collectives.size == 1:
            hidden = embedding(token_ids, self._embedding.weight).float()
        else:
            hidden = self._embedding.embed(token_ids)
        if len(token_ids) == 1:
            for layer in self._layers:
                layer.take_row(hidden, self._angles, attention, step)
            return hidden
        update = None
        for layer in self._layers:
            update = layer.take_rows(hidden, update, self._angles, attention, step)
        assert update is not None
        return hidden.add_(update)

    def logits(self, hidden: Tensor) -> Tensor | None:
        """float32 [num_rows, vocab_size] on rank 0, None elsewhere; every rank must call it."""
        weight = self._head.weight
        if len(hidden) == 1:
            part = hidden.new_empty(1, len(weight))
            self._kernels.multiply_row(hidden, weight, part, (self._norm.weight, self._eps))
        else:
            part = self._wide_product(
                self._kernels.rms_norm(hidden, self._norm.weight, self._eps, weight.dtype)
            )
        gathered = self._collectives.gather_last_dim(part)
        return None if gathered is None else gathered[:, : self._vocab_size]

    def _wide_product(self, normed: Tensor) -> Tensor:
        """With the head, in float32 where torch can: equal logits by rounding are rare then."""
        if self._has_wide_products:
            return torch.mm(normed, self._head.weight.t(), out_dtype=torch.float32)
        return linear(normed, self._head.weight).float()


class DeviceLayer(LayerWeights):
    """Attention and FFN, each behind a norm and added to the residual stream."""

    def __init__(
        self,
        shape: ModelShape,
        collectives: Collectives,
        kernels: DecoderKernels,
        *,
        index: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(shape, collectives, index=index, dtype=dtype)
        self._collectives = collectives
        self._kernels = kernels
        self._head_dim = shape.head_dim
        self._eps = shape.rms_norm_eps
        self._bias = self._qkv.bias

    def finish(self) -> None:
        """The bias in the dtype of the weights, as cuBLAS adds it."""
        self._bias = self._qkv.bias.to(self._qkv.weight.dtype)

    def weights(self) -> list[Tensor]:
        """Matrices and biases of the layer."""
        matrices = (self._qkv, self._output, self._gate_up, self._down)
        return [*(one.weight for one in matrices), self._qkv.bias]

    def norms(self) -> tuple[RMSNorm, RMSNorm]:
        """Both norms of the layer."""
        return self._input_norm, self._ffn_norm

    def take_rows(
        self,
        hidden: Tensor,
        update: Tensor | None,
        angles: Tensor,
        attention: DeviceAttention,
        step: DeviceStep,
    ) -> Tensor:
        """Take the residual stream through this layer, in place.

        `update` [num_rows, hidden] is still to be added to it, and so is what this returns.
        """
        kernels, eps, dtype = self._kernels, self._eps, self._qkv.weight.dtype
        if update is None:
            normed = kernels.rms_norm(hidden, self._input_norm.weight, eps, dtype)
        else:
            normed = kernels.add_rms_norm(hidden, update, self._input_norm.weight, eps)
        found = self._attend(linear(normed, self._qkv.weight, self._bias), angles, attention, step)
        update = self._collectives.all_reduce(linear(found, self._output.weight))
        normed = kernels.add_rms_norm(hidden, update, self._ffn_norm.weight, eps)
        inner = kernels.silu_and_multiply(linear(normed, self._gate_up.weight))
        return self._collectives.all_reduce(linear(inner, self._down.weight))

    def take_row(
        self, hidden: Tensor, angles: Tensor, attention: DeviceAttention, step: DeviceStep
    ) -> None:
        """Take the residual stream of a single row through this layer, in place."""
        kernels, weight = self._kernels, self._qkv.weight
        qkv = kernels.multiply_row(
            hidden,
            weight,
            weight.new_empty(1, len(weight)),
            (self._input_norm.weight, self._eps),
            self._qkv.bias,
        )
        self._add_product(self._attend(qkv, angles, attention, step), self._output, hidden)
        inner = kernels.multiply_gate_up_row(
            hidden, self._gate_up.weight, (self._ffn_norm.weight, self._eps)
        )
        self._add_product(inner, self._down, hidden)

    def _attend(
        self, qkv: Tensor, angles: Tensor, attention: DeviceAttention, step: DeviceStep
    ) -> Tensor:
        heads = qkv.view(len(qkv), -1, self._head_dim)
        cache = attention.cache
        keys, values = cache.keys[self._index], cache.values[self._index]
        query = self._kernels.rotate_and_store(heads, angles, step.places, keys, values)
        return attention.attend(self._index, query, step)

    def _add_product(self, x: Tensor, projection: RowLinear, hidden: Tensor) -> None:
        """Add one row's product, summed over the ranks, to the residual stream."""
        if self._collectives.size == 1:
            self._kernels.multiply_row(x, projection.weight, hidden, is_added=True)
            return
        part = self._kernels.multiply_row(x, projection.weight, torch.empty_like(hidden))
        hidden += self._collectives.all_reduce(part)


def _has_wide_products(weight: Tensor) -> bool:
    """Whether torch multiplies these matrices into float32 (CUDA, from 2.8 on)."""
    if weight.dtype == torch.float32 or weight.device.type != "cuda":
        return False
    try:
        torch.mm(weight[:2], weight[:2].t(), out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return False
    return True
