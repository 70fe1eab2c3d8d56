"""Decode steps as CUDA graphs: one for each of a few batch sizes, captured once, replayed.

Not for prompts, whose shapes vary. The one decision behind it: a batch is padded to the next size
with rows of the scratch slot, so a step of any number of decodes is one launch; without graphs the
same padded step runs eagerly, which is how a CPU tests the padding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ALIGNED = 4  # int32 values in 16 bytes

Decode = Callable[[Tensor], Tensor | None]
"""From int32 [3, batch] (slots, positions, tokens or -1) to logits on rank 0."""


def batch_sizes(max_rows: int) -> list[int]:
    """1, 2, 4, then multiples of 8 up to 64, of 32 up to 256, of 64 on; `max_rows` is the last."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 32), *range(256, max_rows, 64)]
    return [size for size in sizes if size < max_rows] + [max_rows]


class DecodeGraphs:
    """Runs decodes of up to `max_rows` rows in the smallest batch size that holds them.

    Args:
        decode: one step; captured where `is_captured`, so it must not look at values.
        max_rows: sequences that may run at once.
        scratch_slot: whose rows fill up a batch.
        device: where to run.
        is_captured: CUDA graphs; `capture` must be called before the first step.
    """

    def __init__(
        self,
        decode: Decode,
        *,
        max_rows: int,
        scratch_slot: int,
        device: torch.device,
        is_captured: bool,
    ) -> None:
        self._decode = decode
        self._sizes = batch_sizes(max_rows)
        self._scratch_slot = scratch_slot
        self._is_captured = is_captured
        # Each row of numbers starts at 16 bytes in every batch size: Triton compiles kernels once.
        num_columns = -(-max_rows // ALIGNED) * ALIGNED
        self._inputs = torch.zeros(3, num_columns, dtype=torch.int32, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: Tensor | None = None

    @property
    def sizes(self) -> list[int]:
        """Batch sizes, ascending."""
        return self._sizes

    def inputs(self, num_rows: int) -> Tensor:
        """Where `num_rows` rows of inputs belong, int32 [3, batch size]; see `Decode`."""
        size = next(size for size in self._sizes if size >= num_rows)
        return self._inputs[:, :size]

    def padding(self, num_rows: int) -> tuple[int, int]:
        """How many rows fill up a batch of `num_rows`, and whose they are."""
        return self.inputs(num_rows).shape[1] - num_rows, self._scratch_slot

    def warm_up(self) -> None:
        """Run every batch size once, so that what compiles has compiled."""
        for size in reversed(self._sizes):
            self._decode(self._scratch_inputs(size))

    def capture(self) -> None:
        """Record every batch size, the largest first: the others live in its memory.

        All leave their logits in one tensor: a graph's own would be kept for as long as it is.
        """
        if not self._is_captured:
            return
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):
            inputs = self._scratch_inputs(size)
            logits = self._decode(inputs)
            if self._logits is None and logits is not None:
                self._logits = torch.empty_like(logits)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                logits = self._decode(inputs)
                if self._logits is not None and logits is not None:
                    self._logits[:size].copy_(logits)
            self._graphs[size] = graph

    def run(self, num_rows: int) -> Tensor | None:
        """Logits of the first `num_rows` rows of the inputs, valid until the next step."""
        inputs = self.inputs(num_rows)
        if self._is_captured:
            self._graphs[inputs.shape[1]].replay()
            logits = self._logits
        else:
            logits = self._decode(inputs)
        return None if logits is None else logits[:num_rows]

    def _scratch_inputs(self, size: int) -> Tensor:
        inputs = self.inputs(size)
        inputs.zero_()
        inputs[0] = self._scratch_slot
        return inputs
