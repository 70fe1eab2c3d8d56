"""The Triton kernels without a GPU: interpreted against their twins, and compiled for one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.timeout(300)  # seconds alone, minutes beside others


def _run_cases(**variables: str) -> None:
    cases = Path(__file__).parent / "kernel_cases.py"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]


def test_every_kernel_agrees_with_its_twin() -> None:
    _run_cases(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_kernel_agrees_with_its_twin_on_a_gpu() -> None:
    _run_cases()


def test_every_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    program = Path(__file__).parent / "compile_for_gpu.py"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, str(program), "90"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(result.stdout.splitlines()) == 13
