"""A rank's handle on a group in shared memory: a thin caller of `shoal_group_*`.

Not the handshake that gives every rank the same memory (`serve.shards.shared_memory`). The one
decision behind it: the handle owns the memory, so it stays mapped for as long as somebody could
still be inside a collective.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from . import abi
from .native import NativeLibrary


class Failure(IntEnum):
    """Why a group is broken."""

    WHOLE = 0
    GONE = 1
    SILENT = 2
    OUT_OF_STEP = 3


class NativeGroup:
    """One rank of a group in `memory`, whose first bytes are the caller's own.

    Args:
        library: the kernels, of any instruction set.
        memory: shared between the ranks, from `offset` on zero before the first one joins.
        offset: where the group begins, a multiple of 64.
        rank: this rank.
        size: ranks in the group.
        num_slot_values: values that a rank sends at once; longer ones go in pieces.
        timeout_s: how long a rank waits for another before it breaks the group.
    """

    def __init__(
        self,
        library: NativeLibrary,
        memory: mmap.mmap,
        *,
        offset: int,
        rank: int,
        size: int,
        num_slot_values: int,
        timeout_s: float,
    ) -> None:
        self.rank = rank
        self.size = size
        self._functions = functions = library.functions
        # The view holds the mapping: an mmap with a view on it cannot be unmapped.
        self._view = (ctypes.c_char * (len(memory) - offset)).from_buffer(memory, offset)
        self._handle: int = functions.shoal_group_join(
            ctypes.addressof(self._view), rank, size, num_slot_values, round(timeout_s * 1000)
        )
        weakref.finalize(self, functions.shoal_group_leave, self._handle).atexit = False

    @staticmethod
    def num_bytes(library: NativeLibrary, *, size: int, num_slot_values: int) -> int:
        """Bytes of memory that a group takes."""
        found: int = library.functions.shoal_group_bytes(size, num_slot_values)
        return found

    def native(self) -> abi.Collectives:
        """The two collectives as C functions; valid as long as this object lives."""
        return abi.Collectives(
            context=self._handle,
            rank=self.rank,
            size=self.size,
            all_reduce=ctypes.cast(self._functions.shoal_group_all_reduce, abi.AllReduce),
            gather=ctypes.cast(self._functions.shoal_group_gather, abi.Gather),
        )

    def all_reduce(self, values: npt.NDArray[np.float32]) -> bool:
        """`values`, contiguous, become the sum over ranks; False where the group is broken."""
        failed = self._functions.shoal_group_all_reduce(
            self._handle, values.ctypes.data, values.size
        )
        return not failed

    def gather(self, values: npt.NDArray[np.float32], out: npt.NDArray[np.float32] | None) -> bool:
        """On rank 0 `out` [size, n] gets every rank's `values` [n]; False where it is broken."""
        failed = self._functions.shoal_group_gather(
            self._handle, values.ctypes.data, values.size, None if out is None else out.ctypes.data
        )
        return not failed

    def limit_silence(self, timeout_s: float) -> None:
        """Wait no longer than this for another rank, from the next wait on."""
        self._functions.shoal_group_limit_silence(self._handle, round(timeout_s * 1000))

    def break_off(self, gone_rank: int) -> None:
        """Say that a rank is gone: every rank's collectives fail from now on."""
        self._functions.shoal_group_break(self._handle, gone_rank)

    def failure(self) -> tuple[Failure, int]:
        """Why the group is broken, and through which rank."""
        rank = ctypes.c_int32()
        reason = self._functions.shoal_group_failure(self._handle, ctypes.byref(rank))
        return Failure(reason), rank.value
