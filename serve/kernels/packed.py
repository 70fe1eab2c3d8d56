"""A weight packed for the native kernels: the only copy there is.

Not a tensor: only the kernels read it. The one decision behind it: memory comes from the system in
huge pages where they are to be had, because a step reads every weight once and pays for each small
page it enters.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

from . import abi
from .dtypes import ABI_DTYPES, DtypeName, Floats, Stored, abi_dtype
from .native import Pool

_HUGE_PAGE_BYTES = 2 << 20


class AlignedMemory:
    """Zeroed memory from a boundary of a huge page on, given back with this object.

    Pages are taken as they are first written.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        # Private: shared memory gets no huge pages.
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._map = mmap.mmap(-1, max(1, num_bytes) + _HUGE_PAGE_BYTES, flags=private)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.address = -(-start // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        # Whole ones: what is behind would take a page of 2 MiB for its last few bytes.
        num_huge_bytes = num_bytes // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
        if num_huge_bytes and hasattr(mmap, "MADV_HUGEPAGE"):
            self._advise_huge_pages(self.address - start, num_huge_bytes)

    def _advise_huge_pages(self, offset: int, num_bytes: int) -> None:
        try:
            self._map.madvise(mmap.MADV_HUGEPAGE, offset, num_bytes)
        except OSError:  # a system without huge pages: small ones serve, slower
            return


class PackedMatrix:
    """A weight [num_outputs, num_inputs] in panels, float32 or bfloat16.

    Args:
        pool: whose library's panel width decides the layout; its threads pack.
        dtype: of the packed values.
        num_outputs: as computed; filled up to whole panels.
        bias: float32, one value for each output of a whole number of panels; kept alive here.
    """

    def __init__(
        self,
        pool: Pool,
        dtype: DtypeName,
        num_outputs: int,
        *,
        num_inputs: int,
        bias: Floats | None = None,
    ) -> None:
        self.panel_width = pool.library.panel_width
        self.num_panels = -(-num_outputs // self.panel_width)
        self.num_inputs = num_inputs
        self.dtype = dtype
        self.bias = bias
        self._pool = pool
        width = self.num_panels * self.panel_width
        if bias is not None and (bias.shape != (width,) or bias.dtype != np.float32):
            raise ValueError(f"bias must be float32 [{width}], got {bias.dtype} {[*bias.shape]}")
        self.num_bytes: int = pool.library.functions.shoal_packed_bytes(
            ABI_DTYPES[dtype], width, num_inputs
        )
        self._memory = AlignedMemory(self.num_bytes)
        self.struct = abi.Matrix(
            panels=self._memory.address,
            bias=None if bias is None else bias.ctypes.data,
            num_outputs=width,
            num_inputs=num_inputs,
            dtype=ABI_DTYPES[dtype],
        )

    def fill_rows(self, first_panel: int, panel_step: int, source: Stored) -> bool:
        """Pack rows of `source` into panels `first_panel`, `first_panel + panel_step`, ...

        Args:
            first_panel: where the first `panel_width` rows go.
            panel_step: distance to where the next ones go.
            source: [num_rows, num_inputs]; rows may be strided. The last panel that it reaches is
                filled up with zeros.

        Returns:
            False where a value is not finite.
        """
        num_rows, num_inputs = source.shape
        last = first_panel + (-(-num_rows // self.panel_width) - 1) * panel_step
        if num_inputs != self.num_inputs or not 0 <= first_panel <= last < self.num_panels:
            raise ValueError(f"{[*source.shape]} does not fit panels {first_panel} to {last}")
        if source.strides[1] != source.itemsize:
            source = source.copy()
        return bool(
            self._pool.library.functions.shoal_pack(
                self._pool.handle,
                self._memory.address,
                ABI_DTYPES[self.dtype],
                self.num_inputs,
                first_panel,
                panel_step,
                source.ctypes.data,
                abi_dtype(source),
                num_rows,
                source.strides[0] // source.itemsize,
            )
        )
