from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from cluster.local.folder import open_run, runs_path
from cluster.local.ports import find_free_ports
from cluster.local.processes import ProcessId, shared_memory_of
from cluster.local.sweep import end_run

MARK = "SHOAL_TEST_MARK"
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
START_TIMEOUT_S = 240.0


@dataclass
class Command:
    """A child of the test: `shoal` or a module beside this file, in a session of its own."""

    process: subprocess.Popen[str]
    output_path: Path

    @property
    def output(self) -> str:
        return self.output_path.read_text(encoding="utf-8")

    def wait_for(self, text: str) -> None:
        self.wait_until(lambda: text in self.output, what=f"{text!r} in the output")

    def wait_until(self, is_true: Callable[[], bool], *, what: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_true():
            assert self.process.poll() is None, f"ended before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {what} in time:\n{self.output}"
            time.sleep(0.05)

    def interrupt(self) -> None:
        """Ctrl-C: the terminal signals the whole foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def join(self) -> int:
        return self.process.wait(timeout=START_TIMEOUT_S)


@dataclass
class Machine:
    """What a run may leave on the machine, before and after; its own home and temp folder."""

    home: Path
    temp: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    seen_ports: set[int] = field(default_factory=set)
    shared_memory: set[str] = field(default_factory=lambda: set(os.listdir("/dev/shm")))
    temp_entries: set[str] = field(default_factory=lambda: set(os.listdir("/tmp")))
    commands: list[Command] = field(default_factory=list)

    def start(self, *arguments: str, module: str = "cluster", is_piped: bool = False) -> Command:
        output_path = self.home.parent / f"output-{len(self.commands)}"
        environment = {
            **os.environ,
            MARK: self.mark,
            "HOME": str(self.home),
            "TMPDIR": str(self.temp),
            "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}",
            "PYTHONUNBUFFERED": "1",
        }
        with output_path.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if is_piped else output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.commands.append(Command(process, output_path))
        return self.commands[-1]

    def run(self, *arguments: str, module: str = "cluster") -> tuple[int, str]:
        command = self.start(*arguments, module=module)
        return command.process.wait(timeout=START_TIMEOUT_S), command.output

    def processes(self) -> list[psutil.Process]:
        """Every live process that descends from this test's commands, however indirectly."""
        found = []
        for process in psutil.process_iter():
            try:
                is_alive = process.status() != psutil.STATUS_ZOMBIE
                if is_alive and process.environ().get(MARK) == self.mark:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def kill_raylets(self, command: Command, *, num_raylets: int) -> None:
        """Kill so many raylets, one after another as they are started."""
        killed: set[int] = set()

        def are_killed() -> bool:
            found = _raylets(self.processes())
            for pid in found.keys() - killed:
                if found[pid] not in found:  # not the start of a worker, a copy for a moment
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
            return len(killed) == num_raylets

        command.wait_until(are_killed, what=f"{num_raylets} raylets")

    def note_ports(self) -> set[int]:
        """Remember (and return) what the run's processes listen on now."""
        pids = {process.pid for process in self.processes()}
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.pid in pids:
                self.seen_ports.add(connection.laddr[1])
        return self.seen_ports

    def assert_nothing_left(self) -> None:
        assert [_told(process) for process in self.processes()] == []
        assert self.seen_ports & _listening_ports() == set()
        assert sorted(path.name for path in self.home.rglob("*")) == []
        assert sorted(path.name for path in self.temp.rglob("*")) == []
        assert self._new_shared_memory() == set()
        new = set(os.listdir("/tmp")) - self.temp_entries
        assert [name for name in new if name.startswith(("ray", "haproxy", "torch", "pymp"))] == []

    def _new_shared_memory(self) -> set[str]:
        everybody = [
            ProcessId(process.pid, process.create_time()) for process in psutil.process_iter()
        ]
        of_others = {Path(path).name for path in shared_memory_of(everybody)}
        return set(os.listdir("/dev/shm")) - self.shared_memory - of_others


def _told(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return [f"process {process.pid}, which has just ended"]


def _raylets(processes: list[psutil.Process]) -> dict[int, int]:
    """The parents of raylets that live, by process id."""
    found = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.name() == "raylet" and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = process.ppid()
    return found


def _listening_ports() -> set[int]:
    connections = psutil.net_connections(kind="tcp")
    return {item.laddr[1] for item in connections if item.status == psutil.CONN_LISTEN}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    home, temp = tmp_path / "home", tmp_path / "temp"
    home.mkdir()
    temp.mkdir()
    machine = Machine(home, temp)
    yield machine
    for process in machine.processes():
        process.kill()
    for command in machine.commands:
        command.process.wait()


@pytest.fixture
def name() -> Iterator[str]:
    name = f"t{uuid.uuid4().hex[:8]}"
    yield name
    is_left = (runs_path() / name).exists()
    if is_left:
        end_run(open_run(name))
    assert not is_left


@pytest.fixture
def port() -> int:
    return find_free_ports(1)[0]
