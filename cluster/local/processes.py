"""Processes by identity: a pid with its start time, so that a reused pid is never signalled.

Not a supervisor. The one decision: a process is ours if it descends from us, or if its environment
carries our run's id (what survives a supervisor that was killed), and only then is it ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import psutil

RUN_ID_VARIABLE = "SHOAL_RUN_ID"
_PR_SET_CHILD_SUBREAPER = 36
_START_TIME_TOLERANCE_S = 0.05


@dataclass(frozen=True, slots=True)
class ProcessId:
    """One process, now and never again: `started_at` is in seconds since the epoch."""

    pid: int
    started_at: float

    @classmethod
    def of(cls, process: psutil.Process) -> ProcessId:
        return cls(process.pid, process.create_time())

    def find(self) -> psutil.Process | None:
        """The live process of this identity; None once it ended, or only its zombie is left."""
        try:
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.started_at) > _START_TIME_TOLERANCE_S:
                return None
            return None if process.status() == psutil.STATUS_ZOMBIE else process
        except psutil.Error:
            return None


def become_subreaper() -> bool:
    """Make orphans among our descendants our own children; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def reap_children() -> None:
    """Collect every child that has ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def descendants() -> list[ProcessId]:
    """Every live process below this one."""
    return _identify(psutil.Process().children(recursive=True))


def processes_of_run(run_id: str) -> list[ProcessId]:
    """Every live process of this user whose environment carries `run_id`, and all below them.

    Below them, since a process that renames itself overwrites its environment. Never this process.
    """
    own_uid = os.getuid()
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.uids().real == own_uid and process.environ().get(RUN_ID_VARIABLE) == run_id:
                for member in (process, *process.children(recursive=True)):
                    found[member.pid] = member
    found.pop(os.getpid(), None)
    return _identify(found.values())


def end_processes(
    find: Callable[[], Iterable[ProcessId]], *, grace_s: float, kill_s: float = 5.0
) -> list[ProcessId]:
    """SIGTERM to what `find` returns, SIGKILL to what is left after `grace_s`.

    `find` is asked again and again, so that what a dying process starts is ended too.

    Returns:
        What is still there `kill_s` after the first SIGKILL (nothing, unless the kernel holds it).
    """
    terminated: set[ProcessId] = set()
    grace_ends = time.monotonic() + grace_s
    kill_ends = grace_ends + kill_s
    while True:
        reap_children()
        alive = [identity for identity in set(find()) if identity.find() is not None]
        now = time.monotonic()
        if not alive or now > kill_ends:
            return alive
        for identity in alive:
            if now > grace_ends:
                _signal(identity, kill=True)
            elif identity not in terminated:
                terminated.add(identity)
                _signal(identity, kill=False)
        time.sleep(0.05)


def shared_memory_of(processes: Iterable[ProcessId]) -> set[str]:
    """Paths in /dev/shm that `processes` map or hold open."""
    paths: set[str] = set()
    for identity in processes:
        process = identity.find()
        if process is None:
            continue
        with contextlib.suppress(psutil.Error, OSError):
            paths.update(file.path for file in process.open_files())
            if hasattr(process, "memory_maps"):
                paths.update(mapping.path for mapping in process.memory_maps())
    return {path for path in paths if path.startswith("/dev/shm/")}


def _identify(processes: Iterable[psutil.Process]) -> list[ProcessId]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(ProcessId.of(process))
    return found


def _signal(identity: ProcessId, *, kill: bool) -> None:
    process = identity.find()
    if process is None:
        return
    with contextlib.suppress(psutil.Error):
        process.kill() if kill else process.terminate()
