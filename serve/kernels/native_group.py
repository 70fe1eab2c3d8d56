"""How ranks meet, as the C kernels see it.

Not the transport: whoever carries the values gives the two functions (`serve.shards`). The one
decision behind it: a native pass reaches its neighbours through two C function pointers and never
asks whether shared memory or a socket lies behind them.
"""

from __future__ import annotations

import ctypes

AllReduce = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
"""(context, float32 [n] summed in place, n) -> 0, or 1 where the group is broken."""

Gather = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p
)
"""(context, float32 [n], n, float32 [size, n] or null) -> 0, or 1 where the group is broken."""


class NativeCollectives(ctypes.Structure):
    """`shoal_collectives` of shoal.h. Without functions where `size` is 1: nobody to meet."""

    _fields_ = (
        ("context", ctypes.c_void_p),
        ("rank", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("all_reduce", AllReduce),
        ("gather", Gather),
    )
