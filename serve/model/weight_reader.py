"""Bytes of a checkpoint's files, read ahead of whoever takes them.

Not aware of tensors: spans of files, in the order of the list. The one decision behind it: files
are read into a few buffers, not mapped. A mapping saves one copy in memory, at several times a
disk's speed and beside the packing, but whoever truncates a mapped file kills this process by
SIGBUS, and whoever writes to it changes values behind the check that they are finite. Read, both
are an error with the file's name, and what is resident is the buffers whatever a tensor's size.

The page cache holds each page once, also where two ranks read the same file: the first to come
reads the disk. Where the machine cannot hold the weights and the files, spans that no other rank
reads leave the cache as soon as they were read; else all stays, for the next start.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from serve.checkpoint import FileState
from serve.errors import CheckpointError
from serve.limits import available_memory_bytes, read_limits

_Bytes = npt.NDArray[np.uint8]

_NUM_READERS = 2
_NUM_BUFFERS = 4  # one each being read, one being taken, one waiting
_NUM_SPANS_AHEAD = 8  # asked of the disk before their turn


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [start, start + num_bytes) of a file; `tensor` is whose they are, for messages."""

    file: str
    tensor: str
    start: int
    num_bytes: int
    is_shared: bool  # other ranks may read these bytes too


class WeightReader:
    """Reads spans of the files of one folder; to be closed.

    Args:
        folder: where the files lie.
        states: the files as they were inspected; one that differs is refused.
    """

    def __init__(self, folder: Path, states: Mapping[str, FileState]) -> None:
        self._folder = folder
        self._states = states
        self._descriptors: dict[str, int] = {}
        num_file_bytes = sum(state.num_bytes for state in states.values())
        self._is_memory_short = available_memory_bytes(read_limits()) < 2 * num_file_bytes

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, spans: Sequence[Span]) -> Generator[_Bytes, None, None]:
        """Yields the bytes of each span, uint8 [num_bytes], valid until the next is asked for.

        Raises:
            CheckpointError: a file is not what was inspected, ends early or cannot be read.
        """
        largest = max((span.num_bytes for span in spans), default=0)
        free = [np.empty(largest, np.uint8) for _ in range(_NUM_BUFFERS)]
        pending: deque[tuple[Future[None], _Bytes, int]] = deque()
        with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="weights") as pool:
            for index, span in enumerate(spans):
                if not free:
                    yield from self._take(pending, free)
                buffer = free.pop()
                descriptor = self._open(span)
                self._ask_ahead(spans, index)
                future = pool.submit(self._fill, descriptor, span, buffer)
                pending.append((future, buffer, span.num_bytes))
            while pending:
                yield from self._take(pending, free)

    @staticmethod
    def _take(
        pending: deque[tuple[Future[None], _Bytes, int]], free: list[_Bytes]
    ) -> Iterator[_Bytes]:
        """The oldest span, once it is there; its buffer is free when the caller comes back."""
        future, buffer, num_bytes = pending.popleft()
        future.result()
        yield buffer[:num_bytes]
        free.append(buffer)

    def _ask_ahead(self, spans: Sequence[Span], index: int) -> None:
        """Let the disk begin with a span to come; the first call, with all up to that one."""
        first = index + _NUM_SPANS_AHEAD if index else 0
        for span in spans[first : index + _NUM_SPANS_AHEAD + 1]:
            descriptor = self._open(span)
            os.posix_fadvise(descriptor, span.start, span.num_bytes, os.POSIX_FADV_WILLNEED)

    def _open(self, span: Span) -> int:
        if span.file not in self._descriptors:
            try:
                descriptor = os.open(self._folder / span.file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as exc:
                raise _unreadable(span, exc.strerror or str(exc)) from exc
            self._descriptors[span.file] = descriptor
            self._check_unchanged(descriptor, span)
        return self._descriptors[span.file]

    def _fill(self, descriptor: int, span: Span, buffer: _Bytes) -> None:
        """Read one span; a thread of the pool."""
        rest = buffer.data[: span.num_bytes]
        try:
            while rest:
                num_read = os.preadv(descriptor, [rest], span.start + span.num_bytes - len(rest))
                if not num_read:
                    raise _unreadable(span, "the file ends before it")
                rest = rest[num_read:]
            if self._is_memory_short and not span.is_shared:
                os.posix_fadvise(descriptor, span.start, span.num_bytes, os.POSIX_FADV_DONTNEED)
        except OSError as exc:
            raise _unreadable(span, exc.strerror or str(exc)) from exc
        self._check_unchanged(descriptor, span)

    def _check_unchanged(self, descriptor: int, span: Span) -> None:
        if FileState.of(os.fstat(descriptor)) != self._states[span.file]:
            raise _unreadable(span, "the file has changed since its header was read")


def _unreadable(span: Span, reason: str) -> CheckpointError:
    return CheckpointError(f"{span.file}: tensor {span.tensor} cannot be read: {reason}")
