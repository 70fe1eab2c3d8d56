"""What a container allows this process: memory and cores, by cgroups 1 and 2.

Not the machine's own size (psutil). The one decision: the tightest limit of a group and of those
above it counts, and a file that cannot be read is no limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import psutil

# Share of a GPU that is left free of what a CUDA program can have: fragmentation, and whoever else
# uses the card. The plan and the shard that takes the rest go by the same one.
GPU_MARGIN = 0.08

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class Limits:
    """What the container allows; None where it does not limit.

    `used_bytes` leaves out files that were read once: the kernel gives them back when asked.
    """

    memory_bytes: int | None = None
    used_bytes: int = 0
    num_cores: int | None = None


def read_limits(root: Path = _CGROUP_ROOT, own: Path = _OWN_CGROUP) -> Limits:
    """The tightest limits of this process' control groups and of those above them."""
    limits = Limits()
    for controllers, group in _groups(own):
        for folder in _upwards(root, controllers, group):
            limits = _tighter(limits, folder)
    return limits


def available_memory_bytes(limits: Limits) -> int:
    """Memory that can still be taken: the machine's, or what a container has left of its own."""
    available = int(psutil.virtual_memory().available)
    if limits.memory_bytes is not None:
        available = min(available, limits.memory_bytes - limits.used_bytes)
    return max(0, available)


def _groups(own: Path) -> list[tuple[str, str]]:
    """(controllers, group) of each line of /proc/self/cgroup; version 2 names no controllers."""
    try:
        lines = own.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    parts = [line.split(":", 2) for line in lines]
    return [(part[1], part[2].strip("/")) for part in parts if len(part) == 3]


def _upwards(root: Path, controllers: str, group: str) -> list[Path]:
    """The folders of a group and of those above it, in either version's layout."""
    if controllers and not {"memory", "cpu"} & set(controllers.split(",")):
        return []
    base = root / controllers if controllers else root
    steps = group.split("/") if group else []
    return [base.joinpath(*steps[:depth]) for depth in range(len(steps), -1, -1)]


def _tighter(limits: Limits, folder: Path) -> Limits:
    memory, used = limits.memory_bytes, limits.used_bytes
    most = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
    if most is not None and (memory is None or most < memory):
        memory = most
        current = folder / "memory.current"
        used = _number(current) or _number(folder / "memory.usage_in_bytes") or 0
        used = max(0, used - _inactive_file_bytes(folder))
    cores = [number for number in (limits.num_cores, _quota(folder)) if number is not None]
    return Limits(memory, used, min(cores) if cores else None)


def _inactive_file_bytes(folder: Path) -> int:
    for line in _text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file") and value.isdigit():
            return int(value)
    return 0


def _quota(folder: Path) -> int | None:
    """Cores' worth of time that a group gets, rounded up."""
    words = _text(folder / "cpu.max").split()
    if len(words) == 2 and words[0].isdigit():
        return math.ceil(int(words[0]) / int(words[1]))
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return math.ceil(quota / period) if quota and period else None


def _number(path: Path) -> int | None:
    """A positive whole number in a file, or None; "max" and -1 are no limit."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
