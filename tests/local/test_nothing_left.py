"""The most important promise of the launcher: whatever ends a run, nothing of it stays."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from cluster.local.folder import open_run, runs_path

if TYPE_CHECKING:
    from tests.local.conftest import Machine

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(480)]


def test_ctrl_c_lets_answers_finish_and_leaves_nothing(
    machine: Machine, name: str, port: int
) -> None:
    up = machine.start(name, str(port), module="toy_up")
    up.wait_for("end ready")
    machine.note_ports()
    folder = runs_path() / name
    assert (folder.stat().st_mode & 0o777, open_run(name).state.phase) == (0o700, "ready")
    answer = _Download(port, "/?20")
    up.interrupt()
    assert up.join() == 0
    assert answer.text() == "chunk\n" * 20 + "end\n"
    assert not folder.exists()
    machine.assert_nothing_left()


def test_ctrl_c_during_the_start_leaves_nothing(machine: Machine, name: str, port: int) -> None:
    up = machine.start(name, str(port), module="toy_up")
    up.wait_until(lambda: len(machine.processes()) > 4, what="Ray's first processes")
    up.interrupt()
    assert up.join() == 0
    assert "failed: stopped before it was ready" in up.output
    machine.assert_nothing_left()


def test_ctrl_c_leaves_nothing_though_nobody_reads_the_output_any_more(
    machine: Machine, name: str, port: int
) -> None:
    up = machine.start("up", "--name", name, "--port", str(port), is_piped=True)
    assert up.process.stdout is not None
    with up.process.stdout as output:
        told = []
        for line in output:
            told.append(line)
            if "Ctrl-C ends it" in line:
                break
        else:
            pytest.fail(f"ended before it was ready:\n{''.join(told)}")
        machine.note_ports()
    up.interrupt()
    up.join()
    machine.assert_nothing_left()


def test_killed_supervisor_is_cleaned_up_by_down(machine: Machine, name: str, port: int) -> None:
    up = machine.start(name, str(port), module="toy_up")
    up.wait_for("end ready")
    machine.note_ports()
    os.kill(up.process.pid, signal.SIGKILL)
    up.join()
    assert machine.processes(), "Ray outlives a supervisor that was killed"
    code, output = machine.run("status", "--name", name)
    assert (code, "shoal down" in output) == (0, True)
    code, output = machine.run("down", "--name", name)
    assert code == 0, output
    machine.assert_nothing_left()


def test_failed_constructor_is_named_and_leaves_nothing(
    machine: Machine, name: str, port: int
) -> None:
    up = machine.start(name, str(port), "the disk is made of cheese", module="toy_up")
    up.join()
    assert "failed: ValueError: the disk is made of cheese\n  raised at /" in up.output
    machine.assert_nothing_left()


def test_raylet_that_dies_in_the_start_is_started_again(
    machine: Machine, name: str, port: int
) -> None:
    up = machine.start(name, str(port), module="toy_up")
    up.wait_for("begin ray")
    assert open_run(name).state.dashboard_port
    machine.kill_raylets(up, num_raylets=2)
    up.wait_for("end ready")
    assert open_run(name).state.dashboard_port in machine.note_ports()
    up.interrupt()
    assert up.join() == 0
    machine.assert_nothing_left()


def test_raylet_that_dies_each_time_is_told_and_leaves_nothing(
    machine: Machine, name: str, port: int
) -> None:
    up = machine.start(name, str(port), module="toy_up")
    machine.kill_raylets(up, num_raylets=3)
    up.join()
    assert "failed: Ray did not start: RuntimeError: the raylet ended with code -9" in up.output
    machine.assert_nothing_left()


def test_port_taken_after_it_was_found_free_is_told_in_one_line_and_leaves_nothing(
    machine: Machine, name: str, port: int
) -> None:
    with socket.create_server(("127.0.0.1", port)):
        up = machine.start(name, str(port), module="toy_up")
        up.join()
    own = f"{psutil.Process().name()} (pid {os.getpid()})"
    assert f"failed: port {port} is in use by {own}\n" in up.output
    assert "Traceback" not in up.output
    machine.assert_nothing_left()


def test_detached_run_answers_refuses_a_twin_and_goes_with_down(
    machine: Machine, name: str, port: int
) -> None:
    common = ("--name", name, "--port", str(port))
    code, output = machine.run("up", *common, "--detach")
    assert code == 0, output
    assert f"http://127.0.0.1:{port}" in output
    assert machine.note_ports()
    code, output = machine.run("up", *common)
    assert (code, f"http://127.0.0.1:{port}" in output) == (3, True)
    code, output = machine.run("status", "--name", name, "--json")
    (report,) = json.loads(output)
    assert (code, report["is_ready"], report["models"]) == (0, True, ["shoal-demo"])
    code, output = machine.run("logs", "--name", name)
    assert code == 0, output
    code, output = machine.run("down", "--name", name)
    assert code == 0, output
    assert machine.run("down", "--name", name)[0] == 4
    machine.assert_nothing_left()


class _Download:
    """One GET in a thread, begun (its head has arrived) when the constructor returns."""

    def __init__(self, port: int, path: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self._connection.request("GET", path)
        self._response = self._connection.getresponse()
        self._body: list[Any] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        self._body.append(self._response.read().decode())
        self._connection.close()

    def text(self) -> str:
        self._thread.join(timeout=120)
        return str(self._body[0])
