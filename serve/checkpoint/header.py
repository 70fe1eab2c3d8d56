"""The header of one safetensors file: which tensors it has, and where their bytes lie.

Eight bytes of length, that much JSON, then the data. Not a reader of tensors
(`serve.model.weights`). The one decision behind it: the tensors must cover the data exactly, as
the format's own library demands: no byte belongs to two tensors, none to nobody.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from .folder import ModelFolder, RepeatedKeyError, parse_object, shown

BYTES_PER_VALUE = {"F32": 4, "BF16": 2, "F16": 2}

_MAX_HEADER_BYTES = 1 << 24
_LENGTH_BYTES = 8
_MAX_DIMS = 8
_POINTER_START = b"version "  # a header of 2.3 * 10**18 bytes, were it safetensors
_POINTER_HINT = "`git lfs pull` in the repository brings it"


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """One tensor of a checkpoint: file name, safetensors dtype, shape, first byte in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor on disk."""
        return math.prod(self.shape) * BYTES_PER_VALUE[self.dtype]


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells that a file is still the one that was looked at."""

    num_bytes: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        """From what `os.stat` or `os.fstat` says."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


@dataclass(frozen=True, slots=True)
class Header:
    """A file's tensors by name, and the file as it was when they were read.

    `refused` are the names of tensors that it describes and that cannot be read.
    """

    state: FileState
    tensors: Mapping[str, TensorLocation]
    refused: frozenset[str]


def read_header(folder: ModelFolder, name: str) -> Header | None:
    """The header of safetensors file `name`; problems go to the folder, None: no header at all."""
    path = folder.file(name)
    if path is None:
        return None
    problems = folder.problems
    try:
        with path.open("rb") as file:
            state = FileState.of(os.fstat(file.fileno()))
            start = file.read(_LENGTH_BYTES)
            if start == _POINTER_START:
                problems.append(f"{name} is a pointer of Git LFS, not the file: {_POINTER_HINT}")
                return None
            length = int.from_bytes(start, "little")
            if state.num_bytes < _LENGTH_BYTES or length > state.num_bytes - _LENGTH_BYTES:
                problems.append(
                    f"{name} is truncated or not safetensors: its header should have"
                    f" {length} bytes, the file has {state.num_bytes}"
                )
                return None
            if length > _MAX_HEADER_BYTES:
                problems.append(
                    f"{name}: header must be <= {_MAX_HEADER_BYTES} bytes, got {length}"
                )
                return None
            entries = parse_object(file.read(length), are_keys_unique=True)
    except OSError as error:
        problems.append(f"{name} cannot be read: {error.strerror}")
        return None
    except RepeatedKeyError as error:
        problems.append(f"{name}: the header describes {shown(str(error))} twice")
        return None
    if entries is None:
        problems.append(f"{name}: the header is not a JSON object")
        return None
    entries.pop("__metadata__", None)
    tensors = _parse(name, entries, _LENGTH_BYTES + length, state.num_bytes, problems)
    return Header(state, tensors, frozenset(entries.keys() - tensors.keys()))


def _parse(
    file: str, entries: Mapping[str, Any], data: int, end: int, problems: list[str]
) -> dict[str, TensorLocation]:
    """Every tensor whose entry is sound; the data is [data, end) of the file."""
    tensors = {}
    found = []
    for name, entry in entries.items():
        place = _parse_entry(file, entry, data)
        if isinstance(place, str):
            found.append(f"{file}: tensor {shown(name)} {place}")
            continue
        tensors[name] = place
    if not found:
        found.extend(_layout_problem(file, tensors, data, end))
    problems.extend(found)
    return tensors


def _parse_entry(file: str, entry: object, data: int) -> TensorLocation | str:
    """The tensor's place, or what is wrong with it."""
    if not isinstance(entry, dict):
        return "has no description"
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        return "has a broken shape or place"
    start, end = offsets
    if start > end:
        return f"ends at byte {end}, before its start at {start}"
    if not isinstance(dtype, str) or dtype not in BYTES_PER_VALUE:
        return f"has dtype {shown(str(dtype)[:20])}, must be one of {', '.join(BYTES_PER_VALUE)}"
    place = TensorLocation(file, dtype, tuple(shape), data + start)
    if end - start != place.num_bytes:
        return f"must have {place.num_bytes} bytes, got {end - start}"
    return place


def _layout_problem(
    file: str, tensors: Mapping[str, TensorLocation], data: int, end: int
) -> list[str]:
    """The first place where the tensors do not lie one behind the other; empty if there is none."""
    by_place = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes))
    if by_place:
        name, last = max(by_place, key=lambda item: item[1].start + item[1].num_bytes)
        if last.start + last.num_bytes > end:
            return [
                f"{file} is truncated: tensor {shown(name)} ends at byte"
                f" {last.start + last.num_bytes}, the file has {end}"
            ]
    reached, former = data, "the header"
    for name, place in by_place:
        if place.start != reached:
            what = "overlaps" if place.start < reached else "does not begin at the end of"
            return [f"{file}: tensor {shown(name)} {what} {shown(former)}"]
        reached, former = reached + place.num_bytes, name
    if reached < end:
        return [
            f"{file} has {end - reached} bytes that belong to no tensor, behind {shown(former)}"
        ]
    return []


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= _MAX_DIMS
        and all(type(item) is int and 0 <= item < 1 << 48 for item in value)
    )
