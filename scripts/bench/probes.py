"""What the machine's memory and arithmetic give at most: `python -m scripts.bench.probes`.

The limits that every other benchmark is held to, measured in the same run: reading 1 GB in huge
pages with the widest vectors, and products summed in registers. Compiled for this CPU on the fly.
The one decision: the limit is the best of many passes; an engine above it means a wrong probe.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from scripts.bench.shoal_run import machine, write_results

SOURCE = Path(__file__).with_name("probes.cpp")
READ_BYTES = 1 << 30
READ_PASSES = 6
ARITHMETIC_PASSES = 40
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
        return (
            f"limits of {self.num_threads} threads: read {self.read_bytes_per_s / 1e9:.1f} GB/s"
            f" ({8 * self.vector_bytes} bit vectors, huge pages), GFLOP/s: {arithmetic}"
        )


class Probes:
    """The compiled probes. Use as a context: the library's folder ends with it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="shoal-probes-")
        library = Path(self._folder.name) / "probes.so"
        compiler = os.environ.get("CXX", "g++")
        subprocess.run([compiler, *_FLAGS, str(SOURCE), "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))
        for name in ("probe_read", "probe_f32", "probe_bf16", "probe_tiles"):
            getattr(self._library, name).restype = ctypes.c_double
        self._library.probe_read.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_int]

    def __enter__(self) -> Probes:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def read_bytes_per_s(self, num_threads: int, num_bytes: int, num_passes: int) -> float:
        """The best pass of reading `num_bytes`; about 0.1 s a pass at 10 GB/s, of 8 ways each."""
        rate: float = self._library.probe_read(num_bytes, num_threads, num_passes)
        assert rate > 0, f"no memory for a probe of {num_bytes} bytes"
        return rate

    def measure(
        self,
        num_threads: int,
        *,
        num_bytes: int = READ_BYTES,
        num_read_passes: int = READ_PASSES,
    ) -> Limits:
        """All limits of `num_threads` threads, some seconds."""
        library = self._library
        return Limits(
            num_threads=num_threads,
            vector_bytes=library.probe_vector_bytes(),
            read_bytes_per_s=self.read_bytes_per_s(num_threads, num_bytes, num_read_passes),
            f32_flops=library.probe_f32(num_threads, ARITHMETIC_PASSES),
            bf16_flops=library.probe_bf16(num_threads, ARITHMETIC_PASSES),
            tile_flops=library.probe_tiles(num_threads, ARITHMETIC_PASSES),
        )


def best(limits: list[Limits]) -> Limits:
    """The best of each figure: what the machine gave at some moment of the run."""
    return Limits(
        num_threads=limits[0].num_threads,
        vector_bytes=limits[0].vector_bytes,
        read_bytes_per_s=max(one.read_bytes_per_s for one in limits),
        f32_flops=max(one.f32_flops for one in limits),
        bf16_flops=max(one.bf16_flops for one in limits),
        tile_flops=max(one.tile_flops for one in limits),
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
    with Probes() as probes:
        rounds = [probes.measure(arguments.threads) for _ in range(arguments.rounds)]
    for limits in rounds:
        print(limits)
    print("best:", best(rounds))
    print("written:", write_results("probes", {"rounds": [asdict(one) for one in rounds]}))


if __name__ == "__main__":
    main()
