"""Number formats of weights: what they are called, their size, their code in C, their numpy type.

Not arithmetic. The one decision behind it: numpy has no bfloat16, so arrays of stored values hold
its bits as uint16. Whoever computes on a CPU needs numpy alone; torch would take a shard seconds
to import and hundreds of megabytes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from . import abi

DtypeName = Literal["float32", "bfloat16", "float16"]

BYTES_PER_VALUE: dict[DtypeName, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

ABI_DTYPES: dict[DtypeName, int] = {
    "float32": abi.F32,
    "bfloat16": abi.BF16,
    "float16": abi.F16,
}

Stored = npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16]
"""Values as they are stored: uint16 holds bfloat16's bits."""

Floats = npt.NDArray[np.float32]

_ABI_OF_STORED = {
    np.dtype(np.float32): abi.F32,
    np.dtype(np.uint16): abi.BF16,
    np.dtype(np.float16): abi.F16,
}


def abi_dtype(values: Stored) -> int:
    """The code in C of an array of stored values."""
    return _ABI_OF_STORED[values.dtype]


def widen(values: Stored) -> Floats:
    """Stored values as float32, which holds each of them exactly."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)
