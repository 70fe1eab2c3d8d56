"""Reads a rank's share of a checkpoint, one tensor at a time.

Not aware of the model: each layer says which ranges of which tensors it wants, as `Cut`s, and where
they go. The one decision behind it: the list of cuts exists before the first read, so the total is
known for progress and no rank reads a byte that it does not keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from serve.checkpoint import BYTES_PER_VALUE, Checkpoint
from serve.errors import CheckpointError

Progress = Callable[[int, int], None]

# Tensors arrive in pieces of rows; every piece but a tensor's last has a multiple of so many.
PIECE_ROWS = 128


class Destination(Protocol):
    """Memory that takes a range of a checkpoint tensor: as it is, converted, packed or on a GPU.

    `shape` is the range's, `num_bytes` what it takes in this memory.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def num_bytes(self) -> int: ...

    def fill(self, source: Tensor, first_row: int) -> bool:
        """Take rows (values of a vector) `first_row` onwards; False: some value is not finite.

        Args:
            source: bfloat16, float16 or float32, [num_rows, row size] or [num_rows]; the rows may
                lie apart. Its memory is used again as soon as this returns.
            first_row: a multiple of `PIECE_ROWS`; pieces come in order, each row once.
        """


class TensorDestination:
    """A torch tensor on the CPU, as a destination; converts to its dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tuple(tensor.shape)
        self.num_bytes = tensor.nbytes
        self._tensor = tensor

    def fill(self, source: Tensor, first_row: int) -> bool:
        rows = self._tensor[first_row : first_row + len(source)]
        rows.copy_(source)
        return bool(torch.isfinite(rows).all())


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
    """Fill every cut; returns the bytes read, as the sum of the ranges asked for.

    Args:
        checkpoint: an inspected folder.
        cuts: what to read, in this order.
        on_progress: called with (bytes read, bytes in all) after every tensor.

    Raises:
        CheckpointError: a tensor is missing, misshapen, unreadable or not finite.
    """
    planned = list(cuts)
    num_total_bytes = sum(_num_bytes(checkpoint, cut) for cut in planned)
    num_read_bytes = 0
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for cut in planned:
            file = checkpoint.tensors[cut.name].file
            try:
                if file not in files:
                    opened = safe_open(str(checkpoint.path / file), framework="pt")
                    files[file] = stack.enter_context(opened)
                index = tuple(slice(*limits) for limits in cut.ranges)
                tensor = files[file].get_slice(cut.name)[index]
            except (OSError, SafetensorError) as exc:
                message = f"{file}: tensor {cut.name} cannot be read: {exc}"
                raise CheckpointError(message) from exc
            if not cut.into.fill(tensor, 0):
                raise CheckpointError(f"{file}: tensor {cut.name} has values that are not finite")
            num_read_bytes += _num_bytes(checkpoint, cut)
            if on_progress is not None:
                on_progress(num_read_bytes, num_total_bytes)
    return num_read_bytes


def _num_bytes(checkpoint: Checkpoint, cut: Cut) -> int:
    """Bytes of the cut on disk, once it is known to fit its tensor."""
    place = checkpoint.tensors.get(cut.name)
    if place is None:
        raise CheckpointError(f"tensor {cut.name} is missing")
    fits = len(place.shape) == len(cut.ranges) and all(
        end <= size for (_, end), size in zip(cut.ranges, place.shape, strict=True)
    )
    if not fits:
        raise CheckpointError(
            f"{place.file}: tensor {cut.name} has shape {list(place.shape)}, too small for the"
            f" ranges {list(cut.ranges)}"
        )
    return math.prod(cut.into.shape) * BYTES_PER_VALUE[place.dtype]
