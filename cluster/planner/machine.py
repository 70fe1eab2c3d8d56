"""What this machine has: cores, memory, number formats, GPUs, and how fast its memory is.

Not the plan. The one decision: what cannot be found out is left at the cautious value, so that
probing never stops a start; limits of a container count like the machine's own.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from serve.limits import available_memory_bytes, read_limits

_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
# What `serve.kernels.build` asks of a CPU, the best first.
_AVX2_FLAGS = frozenset({"avx2", "fma", "f16c"})
_AVX512_FLAGS = _AVX2_FLAGS - {"avx2"} | {
    f"avx512{part}" for part in ("f", "bw", "vl", "dq", "_bf16")
}
_KERNEL_FLAGS = {
    "amx": _AVX512_FLAGS | {"amx_tile", "amx_bf16"},
    "avx512": _AVX512_FLAGS,
    "avx2": _AVX2_FLAGS,
}
_NVIDIA_SMI_TIMEOUT_S = 10.0
_PROBE_FLOATS = 32 * 1024 * 1024
# A product so small that the BLAS keeps it on one thread, so many times: threads of ours are timed,
# not a BLAS whose threads wait for each other.
_PROBE_PRODUCT = (64, 128, 32)
_PROBE_NUM_PRODUCTS = 16
_PROBE_REPEATS = 32
_PROBE_S = 0.7
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class FoundGpu:
    """One GPU as the driver tells it."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What the plan depends on; None is "not known"."""

    num_cores: int
    has_bfloat16: bool
    total_bytes: int | None = None
    available_bytes: int | None = None
    gpus: tuple[FoundGpu, ...] = ()
    kernels: tuple[str, ...] = ()
    """CPU kernels that can run here (`hardware.kernels`), the best first; none: torch alone."""

    @classmethod
    def detect(cls) -> Machine:
        """This machine, as far as this process may use it."""
        limits = read_limits()
        total = int(psutil.virtual_memory().total)
        if limits.memory_bytes is not None:
            total = min(total, limits.memory_bytes)
        return cls(
            num_cores=max(1, min(_usable_cores(), limits.num_cores or _usable_cores())),
            has_bfloat16=bool(_BFLOAT16_FLAGS & _cpu_flags()),
            total_bytes=total,
            available_bytes=available_memory_bytes(limits),
            gpus=find_gpus(),
            kernels=usable_kernels(_cpu_flags()),
        )

    @property
    def largest_model_bytes(self) -> int | None:
        """Weights that may fit at all: in free memory, or on all GPUs; None where unknown."""
        if self.available_bytes is None:
            return None
        return max(self.available_bytes, sum(gpu.memory_bytes for gpu in self.gpus))

    def stores_bfloat16(self, kernels: str = "auto") -> bool:
        """Whether bfloat16 is the faster type for weights: half the bytes, read at full speed."""
        return self.has_bfloat16 or (kernels != "torch" and bool(self.kernels))


def usable_kernels(cpu_flags: frozenset[str]) -> tuple[str, ...]:
    """The kernels of a CPU with these flags (`/proc/cpuinfo`), the best first."""
    return tuple(name for name, flags in _KERNEL_FLAGS.items() if flags <= cpu_flags)


def find_gpus() -> tuple[FoundGpu, ...]:
    """The GPUs that `nvidia-smi` lists; none where it is missing, fails or hangs.

    The program comes with every driver and into every container that may use one, and says what
    NVML would: nothing more to install.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ()
    return tuple(gpu for line in result.stdout.splitlines() if (gpu := _parse_gpu(line)))


def measure_cpu(num_cores: int) -> tuple[float, float]:
    """Bytes read and float32 operations done a second by `num_cores`; about 0.8 s.

    Every core reads a slice of 128 MB, then every core multiplies small matrices, in turn; the
    median of the passes, because a virtual machine's best moments do not last as a model's steps
    do. By CPU time, not by the clock: what other processes take away does not count.
    """
    import numpy as np

    num_rows, depth, num_columns = _PROBE_PRODUCT
    slices = np.array_split(np.ones(_PROBE_FLOATS, np.float32), num_cores)
    left = np.ones((num_rows, depth), np.float32)
    rights = np.ones((num_cores, _PROBE_NUM_PRODUCTS, depth, num_columns), np.float32)
    outs = np.empty((num_cores, _PROBE_NUM_PRODUCTS, num_rows, num_columns), np.float32)

    def multiply(core: int) -> None:
        for _ in range(_PROBE_REPEATS):
            np.matmul(left, rights[core], out=outs[core])

    cores = range(num_cores)
    reads_s: list[float] = []
    computes_s: list[float] = []
    deadline = time.perf_counter() + _PROBE_S
    with ThreadPoolExecutor(num_cores) as threads:
        while not computes_s or time.perf_counter() < deadline:
            reads_s.append(_cpu_seconds(lambda: list(threads.map(np.max, slices))))
            computes_s.append(_cpu_seconds(lambda: list(threads.map(multiply, cores))))
    read_s, compute_s = statistics.median(reads_s), statistics.median(computes_s)
    # The CPU time is all cores' together, and they work at once: hence their number.
    num_products = _PROBE_NUM_PRODUCTS * _PROBE_REPEATS * num_cores
    num_operations = 2 * math.prod(_PROBE_PRODUCT) * num_products
    return 4 * _PROBE_FLOATS * num_cores / read_s, num_operations * num_cores / compute_s


def _cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of all threads of this process while `work` runs."""
    began = time.process_time()
    work()
    return max(time.process_time() - began, 1e-6)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _parse_gpu(line: str) -> FoundGpu | None:
    name, _, memory = line.rpartition(",")
    if not name.strip() or not memory.strip().isdigit():
        return None
    return FoundGpu(name.strip(), int(memory) * _MIB)
