"""What a runner is loaded from: options that were checked against the checkpoint.

Not the loading (`.loading`): CPU and CUDA runners are made from the same plan. "auto" for the KV
cache is resolved here, once, and agreed on by all ranks: the smallest rank's memory decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from serve.catalog import ModelShape, tensor_parallel_problem
from serve.checkpoint import Checkpoint
from serve.errors import CheckpointError, ConfigurationError
from serve.kernels.dtypes import BYTES_PER_VALUE, DtypeName
from serve.model.tensor_parallel import Collectives
from serve.model.weights import Progress

from .batch import SequenceTable
from .kv_pool import auto_kv_cache_tokens
from .sampling_table import SamplingTable


@dataclass(frozen=True, slots=True)
class RunnerPlan:
    """What to load; `check` says whether the options fit the checkpoint.

    `shape` is the checkpoint's, stretched where YaRN was asked for. `kv_cache_tokens` None: what
    memory allows.
    """

    checkpoint: Checkpoint
    shape: ModelShape
    collectives: Collectives
    dtype: DtypeName
    block_size: int
    num_threads: int
    num_real_tokens: int
    eos_token_ids: tuple[int, ...]
    max_running_sequences: int
    max_model_len: int
    kv_cache_tokens: int | None
    on_progress: Progress | None

    def check(self) -> None:
        """Refuse options that do not fit the checkpoint.

        Raises:
            CheckpointError: the tokenizer has more ids than the model.
            ConfigurationError: the size of the group or the length of a sequence is not legal.
        """
        problem = tensor_parallel_problem(self.shape, self.collectives.size)
        if problem is not None:
            raise ConfigurationError(problem)
        if self.max_model_len > self.shape.max_positions:
            raise ConfigurationError(
                f"max_model_len must be <= {self.shape.max_positions} (the checkpoint's positions),"
                f" got {self.max_model_len}"
            )
        if self.num_real_tokens > self.shape.vocab_size:
            raise CheckpointError(
                f"tokenizer.json has {self.num_real_tokens} ids, config.json's vocab_size is"
                f" {self.shape.vocab_size}"
            )

    def make_sequences(self, *, block_stride: int = 1) -> SequenceTable:
        """An empty table for as many sequences as may run."""
        return SequenceTable(
            max_slots=self.max_running_sequences,
            max_tokens=self.max_model_len,
            block_size=self.block_size,
            block_stride=block_stride,
        )

    def make_sampling(self) -> SamplingTable:
        """The same of their sampling parameters."""
        return SamplingTable(
            max_slots=self.max_running_sequences,
            num_ids=self.num_real_tokens,
            eos_token_ids=self.eos_token_ids,
        )

    def num_blocks(self) -> int:
        """Blocks of the KV pool, the same on every rank; asked once the weights are loaded.

        Raises:
            ConfigurationError: not even one block fits.
        """
        num_tokens = self.kv_cache_tokens
        if num_tokens is None:
            mine = auto_kv_cache_tokens(
                self.shape,
                size=self.collectives.size,
                bytes_per_value=BYTES_PER_VALUE[self.dtype],
            )
            num_tokens = min(self.collectives.numbers(mine))
        if num_tokens < self.block_size:
            raise ConfigurationError(
                f"the KV cache must hold at least one block ({self.block_size} tokens),"
                f" got {num_tokens} tokens"
            )
        return num_tokens // self.block_size
