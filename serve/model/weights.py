"""Reads a rank's share of a checkpoint, piece by piece, into the memory that computes with it.

Not aware of the model: each layer says which ranges of which tensors it wants, as `Cut`s, and
where they go. The one decision behind it: the list of cuts exists before the first read, so the
total is known for progress, files are read from their beginning to their end whatever the order
of the layers, and no rank reads rows that it does not keep. Columns are cut from whole rows:
disks read in larger units than a rank's part of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from serve.checkpoint import BYTES_PER_VALUE, Checkpoint, TensorLocation
from serve.errors import CheckpointError
from serve.kernels.dtypes import Floats, Stored, widen

from .weight_reader import Span, WeightReader

Progress = Callable[[int, int], None]

# Tensors arrive in pieces of rows; every piece but a tensor's last has a multiple of so many.
PIECE_ROWS = 128

_PIECE_BYTES = 1 << 23
_STORED_DTYPES = {"F32": np.float32, "BF16": np.uint16, "F16": np.float16}


class Destination(Protocol):
    """Memory that takes a range of a checkpoint tensor: as it is, converted, packed or on a GPU.

    `shape` is the range's, `num_bytes` what it takes in this memory.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def num_bytes(self) -> int: ...

    def fill(self, source: Stored, first_row: int) -> bool:
        """Take rows (values of a vector) `first_row` onwards; False: some value is not finite.

        Args:
            source: [num_rows, row size] or [num_rows]; the rows may lie apart. Its
                memory is used again as soon as this returns.
            first_row: a multiple of `PIECE_ROWS`; pieces come in order, each row once.
        """


class VectorDestination:
    """A float32 array [n], as a destination."""

    def __init__(self, values: Floats) -> None:
        self.shape = values.shape
        self.num_bytes = values.nbytes
        self._values = values

    def fill(self, source: Stored, first_row: int) -> bool:
        """See `Destination.fill`."""
        values = self._values[first_row : first_row + len(source)]
        values[:] = widen(source)
        return bool(np.isfinite(values).all())


@dataclass(frozen=True, slots=True)
class Cut:
    """A range of a checkpoint tensor and the memory that takes it.

    `ranges` are [start, end) for each dimension of the tensor; `into` has their shape.
    """

    name: str
    ranges: tuple[tuple[int, int], ...]
    into: Destination


def whole(name: str, into: Destination) -> Cut:
    """The cut that takes all of a tensor."""
    return Cut(name, tuple((0, size) for size in into.shape), into)


def load(checkpoint: Checkpoint, cuts: Iterable[Cut], on_progress: Progress | None = None) -> int:
    """Fill every cut; returns the bytes asked for, as they lie on disk.

    Args:
        checkpoint: an inspected folder.
        cuts: what to read; done in the order of the files, not in this one.
        on_progress: called with (bytes read, bytes in all) after every piece.

    Raises:
        CheckpointError: a tensor is missing, misshapen, unreadable or not finite, or its file is
            not what was inspected.
    """
    pieces = [piece for cut in cuts for piece in _pieces(checkpoint, cut)]
    pieces.sort(key=lambda piece: (piece.span.file, piece.span.start))
    num_total_bytes = sum(piece.num_bytes for piece in pieces)
    num_read_bytes = 0
    with ExitStack() as stack:
        reader = stack.enter_context(closing(WeightReader(checkpoint.path, checkpoint.files)))
        spans = stack.enter_context(closing(reader.read([piece.span for piece in pieces])))
        for piece, content in zip(pieces, spans, strict=True):
            if not piece.cut.into.fill(piece.view(content), piece.first_row):
                raise CheckpointError(
                    f"{piece.span.file}: tensor {piece.cut.name} has values that are not finite"
                )
            num_read_bytes += piece.num_bytes
            if on_progress is not None:
                on_progress(num_read_bytes, num_total_bytes)
    return num_read_bytes


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some rows of a cut: the whole rows as they lie in the file, and what is wanted of them."""

    cut: Cut
    span: Span
    first_row: int  # of the cut
    num_rows: int
    place: TensorLocation

    @property
    def num_bytes(self) -> int:
        """Bytes that the cut wants of this piece."""
        columns = math.prod(end - start for start, end in self.cut.ranges[1:])
        return self.num_rows * columns * BYTES_PER_VALUE[self.place.dtype]

    def view(self, content: npt.NDArray[np.uint8]) -> Stored:
        """The wanted values, over the bytes of the span."""
        values: Stored = content.view(_STORED_DTYPES[self.place.dtype])
        columns = tuple(slice(*limits) for limits in self.cut.ranges[1:])
        return values.reshape(self.num_rows, *self.place.shape[1:])[(slice(None), *columns)]


def _pieces(checkpoint: Checkpoint, cut: Cut) -> Iterator[_Piece]:
    """A cut of a tensor that fits it, in pieces of a bounded size."""
    place = _place_of(checkpoint, cut)
    row_bytes = math.prod(place.shape[1:]) * BYTES_PER_VALUE[place.dtype]
    start, end = cut.ranges[0]
    step = max(_PIECE_BYTES // max(row_bytes, 1) // PIECE_ROWS, 1) * PIECE_ROWS
    is_shared = cut.into.shape[1:] != place.shape[1:] or place.num_bytes < _PIECE_BYTES
    for row in range(start, end, step):
        num_rows = min(step, end - row)
        first_byte = place.start + row * row_bytes
        span = Span(place.file, cut.name, first_byte, num_rows * row_bytes, is_shared)
        yield _Piece(cut, span, row - start, num_rows, place)


def _place_of(checkpoint: Checkpoint, cut: Cut) -> TensorLocation:
    """The tensor that a cut is of, once it is known to contain it."""
    assert cut.into.shape == tuple(end - start for start, end in cut.ranges), cut.name
    place = checkpoint.tensors.get(cut.name)
    if place is None:
        raise CheckpointError(f"tensor {cut.name} is missing")
    fits = len(place.shape) == len(cut.ranges) and all(
        0 <= start <= end <= size
        for (start, end), size in zip(cut.ranges, place.shape, strict=True)
    )
    if not fits:
        raise CheckpointError(
            f"{place.file}: tensor {cut.name} has shape {list(place.shape)}, too small for the"
            f" ranges {list(cut.ranges)}"
        )
    return place
