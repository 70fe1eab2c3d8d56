"""Ends what a run started and removes what it left: the same for Ctrl-C, `down` and a crash.

Not draining (the supervisor does that first). The order matters: the raylet ends its own workers
while the GCS still answers, then the rest goes, then files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from cluster.errors import CommandError

from .folder import RunFolder
from .processes import (
    ProcessId,
    descendants,
    end_processes,
    processes_of_run,
    shared_memory_of,
)

_RAYLET_GRACE_S = 4.0
_GRACE_S = 3.0
_SHARED_MEMORY = Path("/dev/shm")


def end_run(run: RunFolder, *, core: Iterable[ProcessId] = ()) -> None:
    """End every process of `run` and remove its folder and shared memory.

    A process is of this run if it descends from us, carries the run's id, or was recorded with its
    start time. `core` holds Ray's own processes, of which the raylet is ended first.

    Raises:
        CommandError: a process is still there after SIGKILL.
    """
    ours = _everything_of(run)
    shared_memory = shared_memory_of(ours)
    raylets = [identity for identity in core if _is_raylet(identity)] or [
        identity for identity in ours if _is_raylet(identity)
    ]
    end_processes(lambda: raylets, grace_s=_RAYLET_GRACE_S)
    left = end_processes(lambda: _everything_of(run), grace_s=_GRACE_S)
    _remove_shared_memory(shared_memory, run_id=run.state.run_id)
    run.remove()
    if left:
        pids = ", ".join(str(identity.pid) for identity in left)
        raise CommandError(f"these processes do not end, not even by SIGKILL: {pids}")


def _everything_of(run: RunFolder) -> list[ProcessId]:
    recorded = [identity for identity in run.state.processes if identity.find() is not None]
    is_ours = run.state.owner.pid == os.getpid()
    below = descendants() if is_ours else []
    return list({*recorded, *below, *processes_of_run(run.state.run_id)})


def _is_raylet(identity: ProcessId) -> bool:
    process = identity.find()
    return process is not None and process.name() == "raylet"


def _remove_shared_memory(paths: set[str], *, run_id: str) -> None:
    named = {str(path) for path in _SHARED_MEMORY.glob(f"*{run_id}*")}
    for path in paths | named:
        with contextlib.suppress(OSError):
            if os.lstat(path).st_uid == os.getuid():
                os.unlink(path)
