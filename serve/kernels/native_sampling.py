"""Batched sampling in C++: a thin caller of `shoal_sample`.

Not the semantics: `serve.runner.sampler` is the reference, and whoever calls fills the rows. The
one decision behind it: how a row is sampled is one record of a numpy array, so that filling in a
batch is column work and no Python object is made for a token.
"""

from __future__ import annotations

import numpy as np

_POINTER = np.uint64

SAMPLING_DTYPE = np.dtype(
    [
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("top_k", np.int32),
        ("num_logprobs", np.int32),
        ("number", np.float64),
        ("mask", _POINTER),
        ("prompt_ids", _POINTER),
        ("num_prompt_ids", np.int64),
        ("output_ids", _POINTER),
        ("output_counts", _POINTER),
        ("num_output_ids", np.int64),
        ("bias_ids", _POINTER),
        ("biases", _POINTER),
        ("num_biases", np.int64),
        ("held_back_ids", _POINTER),
        ("num_held_back_ids", np.int64),
    ],
    align=True,
)
"""`shoal_sampling` of shoal.h. Pointers are addresses (`array.ctypes.data`), 0 where there is
nothing; what they point at has to live as long as the call: uint32 masks, int32 ids and counts,
float32 biases."""
