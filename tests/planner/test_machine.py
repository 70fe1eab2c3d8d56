from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.planner.machine import FoundGpu, Machine, find_gpus, measure_cpu, read_limits

GIB = 1 << 30


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


def test_limits_of_a_container_in_version_2_are_the_tightest_of_its_groups(tmp_path: Path) -> None:
    write(tmp_path / "own", "0::/kubepods/pod1/c1\n")
    root = tmp_path / "root"
    write(root / "kubepods/memory.max", str(64 * GIB))
    write(root / "kubepods/pod1/memory.max", str(16 * GIB))
    write(root / "kubepods/pod1/memory.current", str(3 * GIB))
    write(root / "kubepods/pod1/c1/memory.max", "max\n")
    write(root / "kubepods/pod1/c1/cpu.max", "350000 100000\n")
    write(root / "cpu.max", "max 100000\n")
    limits = read_limits(root, tmp_path / "own")
    assert (limits.memory_bytes, limits.used_bytes, limits.num_cores) == (16 * GIB, 3 * GIB, 4)


def test_limits_in_version_1_are_read_from_each_controller(tmp_path: Path) -> None:
    write(tmp_path / "own", "9:name=systemd:/x\n4:memory:/docker/a\n1:cpu:/docker/a\n3:cpuset:/\n")
    root = tmp_path / "root"
    write(root / "memory/docker/a/memory.limit_in_bytes", str(8 * GIB))
    write(root / "memory/docker/a/memory.usage_in_bytes", str(GIB))
    write(root / "cpu/docker/a/cpu.cfs_quota_us", "200000")
    write(root / "cpu/docker/a/cpu.cfs_period_us", "100000")
    write(root / "cpu/cpu.cfs_quota_us", "-1")
    limits = read_limits(root, tmp_path / "own")
    assert (limits.memory_bytes, limits.used_bytes, limits.num_cores) == (8 * GIB, GIB, 2)


def test_inside_a_container_s_namespace_the_root_holds_the_limit(tmp_path: Path) -> None:
    write(tmp_path / "own", "0::/\n")
    write(tmp_path / "root/memory.max", str(4 * GIB))
    assert read_limits(tmp_path / "root", tmp_path / "own").memory_bytes == 4 * GIB


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    limits = read_limits(tmp_path / "nothing", tmp_path / "none")
    assert (limits.memory_bytes, limits.used_bytes, limits.num_cores) == (None, 0, None)


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
