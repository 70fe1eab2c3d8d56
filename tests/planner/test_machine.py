from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.planner.machine import FoundGpu, Machine, find_gpus, measure_cpu


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a program of a given body on the path as nvidia-smi."""

    def make(body: str) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        write(program, f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")

    return make


def test_gpus_are_those_that_the_driver_lists(smi) -> None:
    line = "NVIDIA GeForce RTX 4090 D, 24564"
    smi(
        'test "$*" = "--query-gpu=name,memory.total --format=csv,noheader,nounits" || exit 9\n'
        f'printf "{line}\\n{line}\\nNVIDIA A100-SXM4-80GB, 81920\\n"'
    )
    small = FoundGpu("NVIDIA GeForce RTX 4090 D", 24564 << 20)
    assert find_gpus() == (small, small, FoundGpu("NVIDIA A100-SXM4-80GB", 81920 << 20))


@pytest.mark.parametrize(
    "body",
    [
        'echo "NVIDIA-SMI has failed because it could not communicate with the driver."; exit 9',
        'echo "No devices were found"',
        'echo "NVIDIA H100 80GB HBM3, [N/A]"',
        'printf "\\377\\376"',
    ],
)
def test_driver_that_fails_means_no_gpus(smi, body: str) -> None:
    smi(body)
    assert find_gpus() == ()


def test_this_machine_has_cores_and_memory() -> None:
    machine = Machine.detect()
    assert machine.num_cores >= 1
    assert machine.total_bytes is not None
    assert machine.available_bytes is not None
    assert 0 < machine.available_bytes <= machine.total_bytes


def test_cpu_is_measured_in_bytes_and_operations_a_second() -> None:
    bandwidth, flops = measure_cpu(2)
    assert 1e8 < bandwidth < 1e13
    assert 1e8 < flops < 1e15


def test_largest_model_fits_memory_or_the_gpus_whichever_is_more() -> None:
    gpus = (FoundGpu("A", 24 << 30), FoundGpu("A", 24 << 30))
    machine = Machine(8, has_bfloat16=True, available_bytes=14 << 30)
    assert machine.largest_model_bytes == 14 << 30
    assert replace(machine, gpus=gpus).largest_model_bytes == 48 << 30
    assert replace(machine, available_bytes=None).largest_model_bytes is None
