"""A model stepped by hand on any kernels, its logits looked at: the runner without sampling.

What tests need that compare logits rather than tokens: any rows of a step can be asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from serve.checkpoint import inspect_checkpoint
from serve.config import Kernels
from serve.kernels.dtypes import DtypeName
from serve.kernels.native import NativeLibrary
from serve.kernels.native_attention import SPAN_DTYPE
from serve.model.tensor_parallel import Collectives
from serve.runner.batch import Batch
from serve.runner.loading import load_native, load_pass
from serve.runner.plan import RunnerPlan
from serve.runner.step_sampler import Logits

Part = tuple[int, int, Sequence[int]]
"""A sequence, the position of its first token in this step, and the tokens."""


class LoadedModel:
    """A rank's model and its KV pool.

    Args:
        path: the checkpoint.
        collectives: this rank's.
        kernels: which to use.
        dtype: of weights and cache.
        num_sequences: each has blocks of its own, in an order that is not theirs.
        max_tokens: of a sequence.
        block_size: KV slots of a block.
        num_threads: of this rank.
    """

    def __init__(
        self,
        path: Path,
        collectives: Collectives,
        *,
        kernels: Kernels | NativeLibrary,
        dtype: DtypeName = "float32",
        num_sequences: int = 1,
        max_tokens: int = 192,
        block_size: int = 16,
        num_threads: int = 1,
    ) -> None:
        checkpoint = inspect_checkpoint(path)
        num_blocks = -(-max_tokens // block_size)
        self._vocab_size = checkpoint.shape.vocab_size
        self._rank = collectives.rank
        plan = RunnerPlan(
            checkpoint=checkpoint,
            shape=checkpoint.shape,
            collectives=collectives,
            dtype=dtype,
            block_size=block_size,
            num_threads=num_threads,
            num_real_tokens=checkpoint.shape.vocab_size,
            eos_token_ids=(),
            max_running_sequences=num_sequences * max_tokens,
            max_model_len=max_tokens,
            kv_cache_tokens=num_sequences * num_blocks * block_size,
            on_progress=None,
        )
        self.loaded = (
            load_native(plan, kernels)
            if isinstance(kernels, NativeLibrary)
            else load_pass(plan, kernels)
        )
        tables = np.random.default_rng(0).permutation(num_sequences * num_blocks)
        units = tables.astype(np.int32) * self.loaded.block_stride
        self._tables = units.reshape(num_sequences, num_blocks)

    def step(self, parts: Sequence[Part], rows: Sequence[int] | None = None) -> list[Logits]:
        """Logits of each part's tokens, float32 [num_tokens, vocab_size]; none on other ranks.

        With `rows` only these rows of the whole step are computed to the end, in one array.
        """
        spans = np.zeros(len(parts), SPAN_DTYPE)
        sizes = [len(token_ids) for _, _, token_ids in parts]
        spans["num_tokens"], spans["first_row"] = sizes, np.cumsum([0, *sizes[:-1]])
        spans["first_position"] = [start for _, start, _ in parts]
        slots = np.array([sequence for sequence, _, _ in parts], np.int32)
        spans["block_table"] = [self._tables[slot].ctypes.data for slot in slots]
        positions = [np.arange(start, start + len(ids)) for _, start, ids in parts]
        num_rows = sum(sizes)
        batch = Batch(
            num_decodes=0,
            token_ids=np.concatenate([np.array(ids, np.int64) for _, _, ids in parts]),
            positions=np.concatenate(positions),
            spans=spans,
            span_slots=slots,
            sampled_rows=np.arange(num_rows) if rows is None else np.array(rows, np.int64),
            sampled_slots=np.zeros(num_rows if rows is None else len(rows), np.int32),
            block_tables=self._tables,
            has_own_tokens=False,
        )
        found = self.loaded.forward.run(batch)
        if found is None:
            return []
        logits = found[:, : self._vocab_size].copy()
        return [logits] if rows is not None else np.split(logits, np.cumsum(sizes)[:-1])
