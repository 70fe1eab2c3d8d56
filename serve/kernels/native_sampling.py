"""Batched sampling in C++: a thin caller of `shoal_sample`.

Not the semantics: `serve.runner.sampler` is the reference, and whoever calls fills the rows. The
one decision behind it: how a row is sampled is one record of a numpy array, so that filling in a
batch is column work and no Python object is made for a token.
"""

from __future__ import annotations

import numpy as np

from . import abi

SAMPLING_DTYPE = np.dtype(abi.Sampling)
"""`shoal_sampling`. Fields that name arrays are addresses (`array.ctypes.data`), 0 where there is
nothing; what they point at has to live as long as the call."""
