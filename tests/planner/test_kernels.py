"""The planner's view of the CPU kernels is the kernels' own, which it may not import."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.planner.machine import usable_kernels
from serve.kernels.build import usable_isas

AVX2 = "fpu sse4_2 avx avx2 fma f16c"
AVX512 = f"{AVX2} avx512f avx512bw avx512vl avx512dq avx512_bf16"


@pytest.mark.parametrize(
    "flags",
    [
        "fpu sse2",
        "avx2 fma",
        AVX2,
        f"{AVX2} avx512f avx512bw avx512vl avx512dq",
        AVX512,
        f"{AVX512} amx_tile amx_int8",
        f"{AVX512} amx_tile amx_bf16",
    ],
)
def test_planner_and_shards_agree_on_what_a_cpu_can_run(flags: str, tmp_path: Path) -> None:
    cpu_info = tmp_path / "cpuinfo"
    cpu_info.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert list(usable_kernels(frozenset(flags.split()))) == usable_isas(cpu_info)
