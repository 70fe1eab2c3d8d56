"""What the machine's memory and arithmetic give at most: `python -m scripts.bench.probes`.

The limits that every other benchmark is held to, measured in the same run: reading 1 GB in huge
pages with the widest vectors, and products summed in registers. Compiled for this CPU on the fly.
The one decision: two figures of the same probe. The burst is the best of several passes, the limit
that nothing may exceed; a virtual machine holds it for moments only. The sustained rate is the
median pass of some seconds, taken beside an engine's own seconds: what a perfect engine would have
reached just then.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from scripts.bench.shoal_run import machine, write_results

SOURCE = Path(__file__).with_name("probes.cpp")
READ_BYTES = 1 << 30
READ_PASSES = 6
SUSTAINED_S = 3.0
_ARITHMETIC_PASSES = 40
_CHOOSING_PASSES = 7
_KINDS = ("f32", "bf16", "tiles")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")


@dataclass(frozen=True, slots=True)
class Limits:
    """What `num_threads` threads reach; `bf16_flops`, `tile_flops` are 0 where a CPU has none."""

    num_threads: int
    vector_bytes: int
    read_bytes_per_s: float
    f32_flops: float
    bf16_flops: float
    tile_flops: float

    @property
    def flops(self) -> float:
        """Of the widest product of bfloat16 weights that this CPU has."""
        return max(self.f32_flops, self.bf16_flops, self.tile_flops)

    def __str__(self) -> str:
        units = {"f32": self.f32_flops, "bf16": self.bf16_flops, "tiles": self.tile_flops}
        arithmetic = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in units.items() if rate)
        return f"read {self.read_bytes_per_s / 1e9:.1f} GB/s, GFLOP/s {arithmetic}"


class Probes:
    """The compiled probes of `num_threads` threads, and the memory that they read.

    Use as a context: the library's folder and the memory end with it. `way` is how a plain loop
    reads fastest on this CPU, by the median of some passes of each: chosen once, for what is
    sustained.

    Raises:
        MemoryError: there is no memory for `num_bytes`.
    """

    def __init__(self, num_threads: int, num_bytes: int = READ_BYTES) -> None:
        self._num_threads = num_threads
        self._folder = tempfile.TemporaryDirectory(prefix="shoal-probes-")
        library = Path(self._folder.name) / "probes.so"
        compiler = os.environ.get("CXX", "g++")
        subprocess.run([compiler, *_FLAGS, str(SOURCE), "-o", str(library)], check=True)
        self._library = _load(library)
        self._memory = self._library.probe_memory_new(num_bytes, num_threads)
        if not self._memory:
            self._folder.cleanup()
            raise MemoryError(f"no memory for a probe of {num_bytes} bytes")
        self._ways = range(self._library.probe_num_ways())
        self._way = self._find_way()

    def __enter__(self) -> Probes:
        return self

    def __exit__(self, *_: object) -> None:
        self._library.probe_memory_delete(self._memory)
        self._folder.cleanup()

    def __str__(self) -> str:
        bits = 8 * self._library.probe_vector_bytes()
        return f"{self._num_threads} threads, {bits} bit vectors, huge pages, read as {self.way}"

    @property
    def way(self) -> str:
        """How many streams of a thread, and how far ahead of them it prefetches."""
        name: bytes = self._library.probe_way(self._way)
        return name.decode()

    def burst(self, num_read_passes: int = READ_PASSES) -> Limits:
        """The best pass of each probe, whatever way of reading gave it; some seconds."""
        return self._limits(
            max(self._read(way) for _ in range(num_read_passes) for way in self._ways),
            [max(self._rates(kind, _ARITHMETIC_PASSES)) for kind in _KINDS],
        )

    def sustained(self, seconds: float = SUSTAINED_S) -> Limits:
        """The median pass of each probe: half of `seconds` reading, then half computing."""
        has_kind = [kind for kind in _KINDS if self._rates(kind, 1)[0]]
        read = _median_until(lambda: self._read(self._way), seconds / 2)
        medians = {
            kind: _median_until(
                lambda kind=kind: self._rates(kind, 1)[0],  # type: ignore[misc]
                seconds / 2 / len(has_kind),
            )
            for kind in has_kind
        }
        return self._limits(read, [medians.get(kind, 0.0) for kind in _KINDS])

    def _find_way(self) -> int:
        passes = [[self._read(way) for way in self._ways] for _ in range(_CHOOSING_PASSES)]
        return max(self._ways, key=lambda way: statistics.median(one[way] for one in passes))

    def _read(self, way: int) -> float:
        rate: float = self._library.probe_read(self._memory, way)
        return rate

    def _rates(self, kind: str, num_passes: int) -> list[float]:
        probe = getattr(self._library, f"probe_{kind}")
        return [probe(self._num_threads) for _ in range(num_passes)]

    def _limits(self, read_bytes_per_s: float, flops: list[float]) -> Limits:
        vector_bytes = self._library.probe_vector_bytes()
        return Limits(self._num_threads, vector_bytes, read_bytes_per_s, *flops)


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.probe_memory_new.restype = ctypes.c_void_p
    library.probe_memory_new.argtypes = [ctypes.c_int64, ctypes.c_int]
    library.probe_memory_delete.argtypes = [ctypes.c_void_p]
    library.probe_read.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.probe_way.restype = ctypes.c_char_p
    for name in ("probe_read", *(f"probe_{kind}" for kind in _KINDS)):
        getattr(library, name).restype = ctypes.c_double
    return library


def _median_until(take_pass: Callable[[], float], seconds: float) -> float:
    """The median of passes for so long, and of at least one."""
    rates = []
    deadline = time.perf_counter() + seconds
    while not rates or time.perf_counter() < deadline:
        rates.append(take_pass())
    return statistics.median(rates)


def between(before: Limits, after: Limits) -> Limits:
    """The mean of each figure: what the machine gave around something that took its time."""
    return Limits(
        num_threads=before.num_threads,
        vector_bytes=before.vector_bytes,
        read_bytes_per_s=(before.read_bytes_per_s + after.read_bytes_per_s) / 2,
        f32_flops=(before.f32_flops + after.f32_flops) / 2,
        bf16_flops=(before.bf16_flops + after.bf16_flops) / 2,
        tile_flops=(before.tile_flops + after.tile_flops) / 2,
    )


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"machine: {machine()}")
    with Probes(arguments.threads) as probes:
        print(probes)
        rounds = []
        for _ in range(arguments.rounds):
            burst, sustained = probes.burst(), probes.sustained()
            print(f"burst: {burst}; sustained: {sustained}", flush=True)
            rounds.append({"burst": asdict(burst), "sustained": asdict(sustained)})
        content = {"way": probes.way, "rounds": rounds}
    print("written:", write_results("probes", content))


if __name__ == "__main__":
    main()
