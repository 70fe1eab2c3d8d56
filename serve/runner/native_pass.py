"""The fast forward pass: one call of `shoal_forward` a step, without the interpreter's lock.

The twin of `.torch_pass`. Nothing is computed here; it keeps alive what the C structures point to.
"""

from __future__ import annotations

import ctypes

import numpy as np

from serve.kernels import abi
from serve.kernels.native import Pool
from serve.model.native_decoder import NativeDecoder
from serve.model.tensor_parallel import Collectives

from .batch import Batch
from .kv_pool import NativeKVPool
from .step_sampler import Logits


class NativePass:
    """A `ForwardPass` over a loaded decoder.

    Args:
        decoder: loaded.
        kv_pool: of the decoder's heads and layers.
        collectives: the decoder's.
        pool: threads that compute.
        max_sampled: most rows that a step samples.
    """

    def __init__(
        self,
        decoder: NativeDecoder,
        kv_pool: NativeKVPool,
        collectives: Collectives,
        *,
        pool: Pool,
        max_sampled: int,
    ) -> None:
        self._decoder = decoder
        self._kv_pool = kv_pool
        self._collectives = collectives
        self._pool = pool
        self._structure = decoder.structure(kv_pool.caches)
        self._group = collectives.native()
        num_rows = max_sampled if collectives.rank == 0 else 0
        self._logits = np.empty((num_rows, decoder.num_logits), np.float32)

    def run(self, batch: Batch) -> Logits | None:
        """See `ForwardPass.run`."""
        num_sampled = len(batch.sampled_rows)
        step = abi.Step(
            num_rows=batch.num_rows,
            token_ids=batch.token_ids.ctypes.data,
            spans=batch.spans.ctypes.data,
            num_spans=len(batch.spans),
            sampled_rows=batch.sampled_rows.ctypes.data,
            num_sampled=num_sampled,
            logits=self._logits.ctypes.data,
        )
        is_broken = self._pool.library.functions.shoal_forward(
            self._pool.handle,
            ctypes.byref(self._structure),
            ctypes.byref(self._group),
            ctypes.byref(step),
        )
        if is_broken:
            raise self._collectives.failure()
        return self._logits[:num_sampled] if self._collectives.rank == 0 and num_sampled else None
