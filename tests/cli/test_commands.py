from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from cluster.local.folder import RunFolder, create_run
from cluster.local.processes import ProcessId

ROOT = Path(__file__).resolve().parents[2]


def shoal(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)


@pytest.fixture
def run() -> Iterator[RunFolder]:
    """A run in the real place whose owner is this process."""
    run = create_run(f"t{uuid.uuid4().hex[:8]}")
    yield run
    run.remove()


def test_help_brings_few_modules_and_neither_torch_nor_ray() -> None:
    code = (
        "import sys; sys.argv = ['shoal', '--help']\n"
        "from cluster.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'transformers', 'pydantic'} & set(sys.modules)\n"
        "print(sorted(heavy), len(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    heavy, _, num_modules = result.stdout.strip().splitlines()[-1].rpartition(" ")
    assert heavy == "[]"
    assert int(num_modules) < 450  # with what is little more than Python's own, it is quick


def test_help_documents_every_exit_code() -> None:
    output = shoal("up", "--help").stdout
    for code in ("0", "1", "2", "3", "4", "130"):
        assert f" {code}  " in output


@pytest.mark.parametrize("command", ["down", "logs", "chat", "status"])
def test_command_on_nothing_ends_with_4(command: str) -> None:
    result = shoal(command, "--name", "nothing-here")
    assert (result.returncode, result.stdout) == (4, "")
    assert "no Shoal named 'nothing-here' is running" in result.stderr


def test_wrong_configuration_ends_with_2_and_every_problem(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("modles: []\nhttp: {port: 0}\n")
    result = shoal("up", str(path))
    assert result.returncode == 2
    assert f"{path}:1: modles: unknown key, did you mean 'models'?" in result.stderr
    assert f"{path}:2: http.port: " in result.stderr
    assert "Traceback" not in result.stderr


def test_wrong_option_ends_with_2() -> None:
    assert shoal("up", "--nope").returncode == 2
    assert shoal("up", "--once", "--detach").returncode == 2
    assert shoal("up", "--name", "Not A Name").returncode == 2


def test_taken_port_is_named_with_its_listener(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        path = tmp_path / "x.yaml"
        path.write_text("models: [{name: x, stand_in: {step_ms: 1}}]\n")
        result = shoal("up", str(path), "--port", str(port))
    assert result.returncode == 2
    assert f"port {port} is in use by " in result.stderr
    assert f"(pid {os.getpid()})" in result.stderr


def test_running_name_is_refused_with_its_address(run: RunFolder) -> None:
    run.update(port=8123, phase="ready")
    result = shoal("up", "--name", run.state.name)
    assert result.returncode == 3
    assert "http://127.0.0.1:8123" in result.stderr


def test_status_tells_one_run_as_text_and_json(run: RunFolder) -> None:
    run.update(port=1, dashboard_port=1, models=("m",), phase="stopping")
    text = shoal("status", "--name", run.state.name).stdout
    assert "stopping, not ready" in text
    (report,) = json.loads(shoal("status", "--name", run.state.name, "--json").stdout)
    assert (report["phase"], report["address"]) == ("stopping", "http://127.0.0.1:1")
    assert (report["models"], report["is_ready"]) == (["m"], False)


def test_logs_show_the_last_lines_of_every_file_of_ours(run: RunFolder) -> None:
    folder = run.ray_path / "session_latest" / "logs"
    (folder / "serve").mkdir(parents=True)
    run.log_path.write_text("one\ntwo\nthree\n")
    (folder / "serve" / "replica.log").write_text("served\n")
    (folder / "raylet.out").write_text("noise\n")
    ours = shoal("logs", "--name", run.state.name, "--lines", "2").stdout
    assert ours.splitlines()[1:3] == ["two", "three"]
    assert "served" in ours
    assert "noise" not in ours
    assert "noise" in shoal("logs", "--name", run.state.name, "--all").stdout


def test_down_of_a_dead_run_ends_what_it_recorded_and_removes_it(run: RunFolder) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        recorded = ProcessId.of(psutil.Process(sleeper.pid))
        dead = ProcessId(run.state.owner.pid, 1.0)
        run.update(owner=dead, processes=(recorded, ProcessId(os.getpid(), 1.0)))
        result = shoal("down", "--name", run.state.name)
        assert (result.returncode, result.stderr) == (0, "")
        assert sleeper.wait(timeout=60) == -signal.SIGTERM
        assert not run.path.exists()
    finally:
        sleeper.kill()
        sleeper.wait()


class _Api(BaseHTTPRequestHandler):
    """Streams numbers for ever, or one answer of three pieces, by the last message."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        try:
            if body["messages"][-1]["content"] == "for ever":
                while True:
                    self._send("again ")
                    time.sleep(0.02)
            for piece in ("你", "好", f" {len(body['messages'])}"):
                self._send(piece)
            self._send("", finish="stop")
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.server.has_lost_client.set()  # type: ignore[attr-defined]

    def _send(self, text: str, finish: str | None = None) -> None:
        event = {"choices": [{"delta": {"content": text}, "finish_reason": finish}]}
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        return None


@pytest.fixture
def api() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Api)
    server.daemon_threads = True
    server.has_lost_client = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_ctrl_c_stops_the_answer_and_not_the_chat(run: RunFolder, api: ThreadingHTTPServer) -> None:
    run.update(port=api.server_address[1], phase="ready", models=("m",))
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "cluster", "chat", "--name", run.state.name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"for ever\n")
    process.stdin.flush()
    seen = b""
    while seen.count(b"again") < 3:
        seen += process.stdout.read1(100)
    process.send_signal(signal.SIGINT)
    assert api.has_lost_client.wait(timeout=60)  # type: ignore[attr-defined]
    rest, _ = process.communicate(b"hello\n", timeout=60)
    assert process.returncode == 0
    assert b"(stopped)" in rest
    assert "你好 3".encode() in rest
