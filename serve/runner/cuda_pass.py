"""One rank's forward pass on its device: rows in, logits of the sampled rows out.

Not aware of sequences or sampling. A step of decodes alone replays a graph; one with prompts runs
eagerly. Everything here only launches.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from serve.attention.cuda import DeviceAttention, DeviceStep, cut_tiles
from serve.kernels.device import Places
from serve.model.cuda_qwen2 import CudaQwen2

from .batch import Batch
from .cuda_graphs import ALIGNED, DecodeGraphs
from .cuda_tables import DeviceTables
from .cuda_transfer import upload

_OWN = -1  # in the place of a token: what was sampled last for the row's slot


class CudaPass:
    """The model over its cache.

    Args:
        model: loaded and finished.
        attention: over this rank's cache.
        tables: by slot.
        max_rows: sequences that may run at once.
        device: of all of them.
        has_graphs: replay decodes as CUDA graphs.
    """

    def __init__(
        self,
        model: CudaQwen2,
        attention: DeviceAttention,
        tables: DeviceTables,
        *,
        max_rows: int,
        device: torch.device,
        has_graphs: bool,
    ) -> None:
        self._model = model
        self._attention = attention
        self._tables = tables
        self._device = device
        self.graphs = DecodeGraphs(
            self._decode,
            max_rows=max_rows,
            scratch_slot=tables.scratch_slot,
            device=device,
            is_captured=has_graphs,
        )

    def run(self, batch: Batch) -> Tensor | None:
        """Logits of the sampled rows on rank 0, valid until the next step; None elsewhere.

        Raises:
            CollectiveError: a rank is gone.
        """
        tokens = batch.token_ids.astype(np.int32)
        if batch.has_own_tokens:
            tokens[: batch.num_decodes] = _OWN
        slots = np.repeat(batch.span_slots, batch.spans["num_tokens"])
        rows = np.stack((slots, batch.positions, tokens), dtype=np.int32, casting="same_kind")
        if batch.num_rows == batch.num_decodes:
            return self.decode(rows)
        return self._mixed(batch, rows)

    def decode(self, rows: np.ndarray) -> Tensor | None:
        """One step of decodes alone, `rows` as `cuda_graphs.Decode` takes them."""
        num_rows = rows.shape[1]
        num_padding, slot = self.graphs.padding(num_rows)
        if num_padding:
            padding = np.zeros((3, num_padding), np.int32)
            padding[0] = slot
            rows = np.concatenate((rows, padding), axis=1)
        self.graphs.inputs(num_rows).copy_(upload(rows, self._device))
        return self.graphs.run(num_rows)

    def prefill(self, rows: np.ndarray, tiles: np.ndarray, sampled: np.ndarray) -> Tensor | None:
        """One step of prompts alone: rows alike, tiles as `cut_tiles` makes them."""
        return self._eager(rows, tiles, sampled, num_decodes=0)

    def warm_up(self, num_tokens: int, max_model_len: int) -> None:
        """Compute prompts of the scratch slot, of so many tokens together.

        What compiles has compiled then, and no step of as many tokens takes more memory.
        """
        slot = self._tables.scratch_slot
        rows = np.zeros((3, num_tokens), np.int32)
        rows[0], rows[1] = slot, np.arange(num_tokens) % max_model_len
        first_rows = np.arange(0, num_tokens, max_model_len)
        num_each = np.minimum(num_tokens - first_rows, max_model_len)
        slots = np.full(len(first_rows), slot, np.int32)
        tiles = cut_tiles(first_rows, num_each, np.zeros_like(first_rows), slots)
        self.prefill(rows, tiles, np.arange(min(num_tokens, self.graphs.sizes[-1])))

    def _mixed(self, batch: Batch, rows: np.ndarray) -> Tensor | None:
        chunks = slice(batch.num_decodes, None)
        spans = batch.spans[chunks]
        tiles = cut_tiles(
            spans["first_row"],
            spans["num_tokens"],
            spans["first_position"],
            batch.span_slots[chunks],
        )
        return self._eager(rows, tiles, batch.sampled_rows, num_decodes=batch.num_decodes)

    def _eager(
        self, rows: np.ndarray, tiles: np.ndarray, sampled: np.ndarray, *, num_decodes: int
    ) -> Tensor | None:
        # Each row of numbers starts where Triton may load 16 bytes at once, whatever its length:
        # otherwise a step of another length would compile its kernels anew.
        num_rows = rows.shape[1]
        aligned = np.pad(rows, ((0, 0), (0, -num_rows % ALIGNED)))
        inputs = upload(aligned, self._device)[:, :num_rows]
        hidden = self._forward(inputs, num_decodes, upload(tiles, self._device))
        if not len(sampled):
            return None
        return self._model.logits(hidden.index_select(0, upload(sampled, self._device)))

    def _decode(self, inputs: Tensor) -> Tensor | None:
        return self._model.logits(self._forward(inputs, inputs.shape[1], None))

    def _forward(self, inputs: Tensor, num_decodes: int, tiles: Tensor | None) -> Tensor:
        slots, positions, given = inputs
        own = self._tables.last_token_ids[slots.long()]
        token_ids = torch.where(given == _OWN, own, given.long())
        self._tables.count(slots[:num_decodes], token_ids[:num_decodes])
        step = DeviceStep(Places(slots, positions, self._tables.block_tables), num_decodes, tiles)
        return self._model.forward(token_ids, self._attention, step)
