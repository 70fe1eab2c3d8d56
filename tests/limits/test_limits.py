from __future__ import annotations

from pathlib import Path

from serve.limits import Limits, available_memory_bytes, read_limits

GIB = 1 << 30


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_limits_of_a_container_in_version_2_are_the_tightest_of_its_groups(tmp_path: Path) -> None:
    write(tmp_path / "own", "0::/kubepods/pod1/c1\n")
    root = tmp_path / "root"
    write(root / "kubepods/memory.max", str(64 * GIB))
    write(root / "kubepods/pod1/memory.max", str(16 * GIB))
    write(root / "kubepods/pod1/memory.current", str(5 * GIB))
    write(root / "kubepods/pod1/memory.stat", f"anon 1\ninactive_file {2 * GIB}\n")
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


def test_what_a_container_has_left_bounds_what_can_be_taken() -> None:
    assert available_memory_bytes(Limits(memory_bytes=1000, used_bytes=400)) == 600
    assert available_memory_bytes(Limits(memory_bytes=1000, used_bytes=1400)) == 0
