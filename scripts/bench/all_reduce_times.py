"""How long ranks take to sum in shared memory: threads of this process in place of processes.

The calls hold no lock of the interpreter, so threads meet as processes do.
"""

from __future__ import annotations

import mmap
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from serve.catalog import ModelShape
from serve.kernels.native import NativeLibrary
from serve.kernels.native_group import NativeGroup

ROWS = (1, 16, 512)
_NUM_MEETINGS = 300
_TIMEOUT_S = 30.0


def all_reduce_cases(
    library: NativeLibrary, shape: ModelShape, *, size: int
) -> list[dict[str, Any]]:
    """Median microseconds of one sum of `size` ranks, by rows of hidden values."""
    return [_measure(library, rows * shape.hidden, size=size, rows=rows) for rows in ROWS]


def _measure(library: NativeLibrary, num_values: int, *, size: int, rows: int) -> dict[str, Any]:
    num_bytes = NativeGroup.num_bytes(library, size=size, num_slot_values=num_values)
    memory = mmap.mmap(-1, num_bytes)
    groups = [
        NativeGroup(
            library,
            memory,
            offset=0,
            rank=rank,
            size=size,
            num_slot_values=num_values,
            timeout_s=_TIMEOUT_S,
        )
        for rank in range(size)
    ]

    def meet(group: NativeGroup) -> float:
        values = np.ones(num_values, np.float32)
        times = []
        for _ in range(_NUM_MEETINGS):
            values[:] = 1.0
            began = time.perf_counter()
            assert group.all_reduce(values), "nobody left"
            times.append(time.perf_counter() - began)
        assert (values == size).all()
        return statistics.median(times)

    with ThreadPoolExecutor(size) as threads:
        took_s = max(threads.map(meet, groups))
    return {"kernel": f"all-reduce of {size}", "size": f"{rows} rows", "us": took_s * 1e6}
