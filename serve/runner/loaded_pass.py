"""A rank's model and its KV pool, whichever kernels compute: what `.loading` makes a runner of."""

from __future__ import annotations

from dataclasses import dataclass

from serve.kernels.native import Pool

from .model_runner import ForwardPass


@dataclass(frozen=True, slots=True)
class LoadedPass:
    """A pass, ready to run; counts as in `RunnerFacts`, `pool` is the native kernels'.

    `block_stride` is the KV pool's (see `SequenceTable`).
    """

    forward: ForwardPass
    pool: Pool | None
    block_stride: int
    kernels: str
    num_total_blocks: int
    num_weight_bytes: int
    num_read_bytes: int
