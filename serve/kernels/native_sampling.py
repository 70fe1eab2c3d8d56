"""Batched sampling in C++: a thin caller of `shoal_sample`.

Not the semantics: `serve.runner.sampler` is the reference, and whoever calls fills the rows. The
one decision behind it: how a row is sampled is one record of a numpy array, so that filling in a
batch is column work and no Python object is made for a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import abi
from .native import Pool

SAMPLING_DTYPE = np.dtype(abi.Sampling)
"""`shoal_sampling`. Fields that name arrays are addresses (`array.ctypes.data`), 0 where there is
nothing; what they point at has to live as long as the call."""

NOT_FINITE, NOTHING_ALLOWED = 1, 2
"""Errors of a row."""


@dataclass(frozen=True, slots=True)
class NativeSamples:
    """One token a row; void where the row has an error.

    `top_ids` and `top_logprobs` are [num_rows, max_logprobs], in a row as far as it asked for them;
    an id is -1 where there are no more.
    """

    token_ids: npt.NDArray[np.int32]
    errors: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    top_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]


def sample(
    pool: Pool, logits: npt.NDArray[np.float32], rows: np.ndarray, *, num_ids: int
) -> NativeSamples:
    """Sample a token for every row.

    Args:
        pool: threads that the rows are spread over.
        logits: [num_rows, >= num_ids], a row's values one after the other; left as they were.
        rows: SAMPLING_DTYPE [num_rows], contiguous.
        num_ids: ids from here on are padding.
    """
    num_rows = len(rows)
    assert logits.dtype == np.float32
    assert rows.dtype == SAMPLING_DTYPE
    assert rows.flags.c_contiguous
    assert len(logits) == num_rows
    assert logits.shape[1] >= num_ids
    assert logits.strides[1] == logits.itemsize
    max_logprobs = max(0, int(rows["num_logprobs"].max(initial=0)))
    found = NativeSamples(
        token_ids=np.empty(num_rows, np.int32),
        errors=np.empty(num_rows, np.int32),
        logprobs=np.empty(num_rows, np.float32),
        top_ids=np.empty((num_rows, max_logprobs), np.int32),
        top_logprobs=np.empty((num_rows, max_logprobs), np.float32),
    )
    pool.library.functions.shoal_sample(
        pool.handle,
        logits.ctypes.data,
        logits.strides[0] // logits.itemsize,
        num_ids,
        rows.ctypes.data,
        num_rows,
        found.token_ids.ctypes.data,
        found.errors.ctypes.data,
        found.logprobs.ctypes.data,
        found.top_ids.ctypes.data,
        found.top_logprobs.ctypes.data,
        max_logprobs,
    )
    return found
