"""What bounds a load: how fast the disk reads files, memory is copied and first touched.

Files are read as the loader reads them, by some threads and in pieces of 8 MiB, after the page
cache has let go of them; the copy is of memory that fits no cache. Memory that a process never had
costs more than a copy: the kernel, and a virtual machine's host, must find and clear it first. The
one decision: as much of it is taken as the weights need, after a pause, because a host takes back
what a machine has freed, and memory that it has not taken yet says nothing of what a load meets.
It may leave some gigabyte, so a small load can be faster than this limit.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_PIECE_BYTES = 1 << 23
_NUM_READERS = 4
_MAX_PROBE_BYTES = 2_000_000_000
_COPY_BYTES = 1 << 28
_COPY_PASSES = 5
_PAUSE_S = 10.0


@dataclass(frozen=True, slots=True)
class LoadLimits:
    """Bytes a second: off the disk; copied, and written into new memory, by `num_threads`."""

    disk_bytes_per_s: float
    copied_bytes_per_s: float
    touched_bytes_per_s: float
    num_threads: int

    def disk_s(self, num_bytes: int) -> float:
        """Seconds that reading takes at least."""
        return num_bytes / self.disk_bytes_per_s

    def memory_s(self, num_bytes: int) -> float:
        """Seconds of a copy from page cache to buffer, and of one to new memory, at least."""
        return num_bytes / self.copied_bytes_per_s + num_bytes / self.touched_bytes_per_s


def measure_limits(files: list[Path], *, num_bytes: int, num_threads: int) -> LoadLimits:
    """For `num_bytes` of weights, in up to a minute; leaves the files out of the page cache."""
    forget(files)
    disk = _disk_bytes_per_s(files)
    forget(files)
    copied = _copied_bytes_per_s(num_threads)
    touched = _touched_bytes_per_s(num_bytes, num_threads)
    return LoadLimits(disk, copied, touched, num_threads)


def let_go_of_memory() -> None:
    """Give a virtual machine's host the time to take back what was freed."""
    time.sleep(_PAUSE_S)


def forget(files: list[Path]) -> None:
    """Let the page cache go of the files."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _disk_bytes_per_s(files: list[Path]) -> float:
    """Of the beginnings of all files, in turn, up to a bound."""
    largest = max(file.stat().st_size for file in files)
    places = [
        (file, offset)
        for offset in range(0, largest, _PIECE_BYTES)
        for file in files
        if offset < file.stat().st_size
    ][: _MAX_PROBE_BYTES // _PIECE_BYTES]
    began = time.perf_counter()
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        num_bytes = sum(pool.map(_read, places))
    return num_bytes / (time.perf_counter() - began)


def _read(place: tuple[Path, int]) -> int:
    buffer = bytearray(_PIECE_BYTES)
    descriptor = os.open(place[0], os.O_RDONLY)
    try:
        return os.preadv(descriptor, [buffer], place[1])
    finally:
        os.close(descriptor)


def _copied_bytes_per_s(num_threads: int) -> float:
    source = np.ones(_COPY_BYTES, np.uint8)
    targets = [np.ones(_COPY_BYTES, np.uint8) for _ in range(num_threads)]
    best = 0.0
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(_COPY_PASSES):
            began = time.perf_counter()
            list(pool.map(lambda target: np.copyto(target, source), targets))
            best = max(best, num_threads * _COPY_BYTES / (time.perf_counter() - began))
    return best


def _touched_bytes_per_s(num_bytes: int, num_threads: int) -> float:
    """Of writing all of as much new memory as that, which is free again afterwards."""
    source = np.ones(_COPY_BYTES, np.uint8)
    num_parts = -(-num_bytes // _COPY_BYTES)
    let_go_of_memory()
    began = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as pool:
        parts = list(pool.map(lambda _: source.copy(), range(num_parts)))
    return len(parts) * _COPY_BYTES / (time.perf_counter() - began)
