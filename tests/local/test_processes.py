from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import psutil
import pytest

from cluster.local.processes import (
    RUN_ID_VARIABLE,
    ProcessId,
    end_processes,
    processes_of_run,
)

SLEEP = "import time; print(1, flush=True); time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SLEEP

PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}], env={{}}, stdout=subprocess.PIPE)
child.stdout.readline()
print(1, flush=True)
child.wait()
"""

Spawn = Callable[..., ProcessId]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start Python code as a child; returns once it has printed its first line."""
    children: list[subprocess.Popen[bytes]] = []

    def start(code: str, **variables: str) -> ProcessId:
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, **variables}
        )
        children.append(child)
        assert child.stdout is not None
        child.stdout.readline()
        return ProcessId.of(psutil.Process(child.pid))

    yield start
    for child in children:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def test_identity_with_another_start_time_is_not_found_and_never_signalled(spawn: Spawn) -> None:
    alive = spawn(SLEEP)
    reused = replace(alive, started_at=alive.started_at - 100)
    assert reused.find() is None
    assert end_processes(lambda: [reused], grace_s=0) == []
    assert alive.find() is not None


def test_process_that_ignores_sigterm_is_killed_after_its_grace(spawn: Spawn) -> None:
    polite, stubborn = spawn(SLEEP), spawn(STUBBORN)
    assert end_processes(lambda: [polite, stubborn], grace_s=0.2) == []
    assert (polite.find(), stubborn.find()) == (None, None)


def test_processes_of_a_run_are_found_by_their_environment_alone(spawn: Spawn) -> None:
    ours = spawn(SLEEP, **{RUN_ID_VARIABLE: "run-a"})
    spawn(SLEEP, **{RUN_ID_VARIABLE: "run-b"})
    spawn(SLEEP)
    assert processes_of_run("run-a") == [ours]


def test_child_that_has_lost_its_environment_is_found_below_its_parent(spawn: Spawn) -> None:
    ours = spawn(PARENT, **{RUN_ID_VARIABLE: "run-a"})
    process = ours.find()
    assert process is not None
    (child,) = process.children()
    assert RUN_ID_VARIABLE not in child.environ()
    assert {identity.pid for identity in processes_of_run("run-a")} == {ours.pid, child.pid}
    assert end_processes(lambda: processes_of_run("run-a"), grace_s=1) == []
