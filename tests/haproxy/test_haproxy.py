"""The edits against the configuration that the installed Ray writes, and the real HAProxy."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.haproxy import (
    HEADER_TIMEOUT_S,
    UnknownTemplateError,
    edit_configuration,
    edits,
    find_binary,
    write_error_files,
)
from cluster.local.ports import find_free_ports, is_port_free

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the HAProxy binary is for Linux"
)

RENDER = """
import sys
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

host = sys.argv[1]
port, backend_port, statistics_port, metrics_port = map(int, sys.argv[2:])
servers = [ServerConfig(name="one", host="127.0.0.1", port=backend_port)]
detour = ServerConfig(name="detour", host="127.0.0.1", port=backend_port)
app = BackendConfig(
    name="app", app_name="app", path_prefix="/", servers=servers, fallback_server=detour
)
backends = {"app": app}
options = HTTPOptions(host=host, port=port)
config = HAProxyConfig(
    http_options=options, is_head=True, stats_port=statistics_port, metrics_port=metrics_port
)
HAProxyApi(cfg=config, backend_configs=backends)._generate_config_file_internal()
"""


class Rendered:
    """Ray's own rendering for one backend that nobody listens on."""

    def __init__(self, folder: Path, *, host: str = "127.0.0.1") -> None:
        self.port, backend, self.statistics, self.metrics = find_free_ports(4)
        self.path = folder / "haproxy.cfg"
        environment = {
            **os.environ,
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(self.path),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "a"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        }
        ports = map(str, (self.port, backend, self.statistics, self.metrics))
        command = [sys.executable, "-c", RENDER, host, *ports]
        subprocess.run(command, env=environment, check=True)
        self.text = self.path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    return Rendered(tmp_path_factory.mktemp("p"))


@pytest.fixture(scope="module")
def proxy(rendered: Rendered) -> Iterator[Rendered]:
    """HAProxy itself, started the way that Ray does: through the launcher."""
    program = [sys.executable, "-m", "cluster.haproxy", "--host", "127.0.0.1"]
    command = [*program, "-db", "-f", str(rendered.path), "-dR"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while is_port_free(rendered.port):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield rendered
    process.kill()
    process.wait()


def exchange(port: int, request: bytes) -> tuple[str, dict[str, str], bytes]:
    """Send raw bytes, read to the end: status line, headers, body."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(request)
        connection.settimeout(HEADER_TIMEOUT_S + 60)
        answer = b""
        while chunk := connection.recv(65_536):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return status, headers, body


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()


def test_edited_configuration_passes_haproxys_own_check(rendered: Rendered, tmp_path: Path) -> None:
    write_error_files(tmp_path)
    edited = tmp_path / "edited.cfg"
    edited.write_text(edit_configuration(rendered.text, error_folder=tmp_path), encoding="utf-8")
    subprocess.run([find_binary(), "-c", "-f", str(edited)], check=True, capture_output=True)


def test_every_edit_changes_rays_template_and_only_the_frontend_follows_the_host(
    rendered: Rendered, tmp_path: Path
) -> None:
    text = rendered.text
    for edit in edits(tmp_path):
        changed = edit.apply(text)
        assert changed != text, edit.name
        text = changed
    binds = [line.strip() for line in text.splitlines() if line.strip().startswith("bind ")]
    assert sorted(binds) == sorted(
        f"bind 127.0.0.1:{port}" for port in (rendered.port, rendered.statistics, rendered.metrics)
    )


@pytest.mark.parametrize(
    ("host", "bind"), [("0.0.0.0", "0.0.0.0:{}"), ("::1", "::1:{}"), ("::", ":::{} v4v6")]
)
def test_clients_reach_the_host_and_nothing_else_moves(
    rendered: Rendered, tmp_path: Path, host: str, bind: str
) -> None:
    write_error_files(tmp_path)
    edited = tmp_path / "edited.cfg"
    text = edit_configuration(rendered.text, error_folder=tmp_path, host=host)
    edited.write_text(text, encoding="utf-8")
    binds = [line.strip() for line in text.splitlines() if line.strip().startswith("bind ")]
    assert sorted(binds) == sorted(
        [
            f"bind {bind.format(rendered.port)}",
            f"bind 127.0.0.1:{rendered.statistics}",
            f"bind 127.0.0.1:{rendered.metrics}",
        ]
    )
    subprocess.run([find_binary(), "-c", "-f", str(edited)], check=True, capture_output=True)


def test_in_a_pod_traffic_comes_from_everywhere_and_nothing_else_does(tmp_path: Path) -> None:
    pod = Rendered(tmp_path, host="0.0.0.0")
    text = edit_configuration(pod.text, error_folder=tmp_path)
    binds = {line.strip() for line in text.splitlines() if line.strip().startswith("bind ")}
    loopback = {f"bind 127.0.0.1:{port}" for port in (pod.statistics, pod.metrics)}
    assert binds == {f"bind *:{pod.port}", *loopback}


@pytest.mark.parametrize("num_files", [256, 1024, 4096])
def test_proxy_starts_where_few_files_may_be_open(
    rendered: Rendered, tmp_path: Path, num_files: int
) -> None:
    limited = f"ulimit -n {num_files}; exec "
    code = "from cluster.local.environment import max_connections as m; print(m())"
    asked = f"{limited} {sys.executable} -c '{code}'"
    answer = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
    write_error_files(tmp_path)
    text = edit_configuration(rendered.text, error_folder=tmp_path)
    ports = find_free_ports(3)
    for former, port in zip((rendered.port, rendered.statistics, rendered.metrics), ports,
                            strict=True):  # fmt: skip
        text = text.replace(f":{former}\n", f":{port}\n")
    text = re.sub(
        r"^    maxconn .*$", f"    maxconn {int(answer.stdout)}", text, flags=re.MULTILINE
    )
    text = re.sub(
        r"^    stats socket \S+", f"    stats socket {tmp_path}/a", text, flags=re.MULTILINE
    )
    (tmp_path / "small.cfg").write_text(text, encoding="utf-8")
    command = f"{limited} {find_binary()} -db -f {tmp_path / 'small.cfg'}"
    process = subprocess.Popen(["bash", "-c", command], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while is_port_free(ports[0]):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()


def test_serves_own_proxy_gets_no_traffic(rendered: Rendered, tmp_path: Path) -> None:
    assert "detour" in rendered.text
    assert "detour" not in edit_configuration(rendered.text, error_folder=tmp_path)


def test_editing_twice_is_editing_once(rendered: Rendered, tmp_path: Path) -> None:
    once = edit_configuration(rendered.text, error_folder=tmp_path)
    assert edit_configuration(once, error_folder=tmp_path) == once


def test_unknown_template_is_refused_by_name_of_the_edit(
    rendered: Rendered, tmp_path: Path
) -> None:
    for edit in edits(tmp_path):
        without_place = re.sub(edit.pattern, "", rendered.text, flags=re.MULTILINE)
        if edit.is_optional:
            assert edit.apply(without_place) == without_place
            continue
        with pytest.raises(UnknownTemplateError, match=edit.name):
            edit.apply(without_place)
        with pytest.raises(UnknownTemplateError):
            edit_configuration(without_place, error_folder=tmp_path)


def test_launcher_refuses_a_strange_file_with_a_plain_message(tmp_path: Path) -> None:
    strange = tmp_path / "haproxy.cfg"
    strange.write_text("global\n", encoding="utf-8")
    command = [sys.executable, "-m", "cluster.haproxy", "-db", "-f", str(strange)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "install the versions of requirements.txt" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("request_bytes", "status", "code", "has_retry"),
    [
        (get("/v1/models"), 503, "not_ready", True),
        (get("/-/routes"), 404, "not_found", False),
    ],
)
def test_haproxys_own_answers_have_openais_shape(
    proxy: Rendered, request_bytes: bytes, status: int, code: str, has_retry: bool
) -> None:
    line, headers, body = exchange(proxy.port, request_bytes)
    error = json.loads(body)["error"]
    assert int(line.split()[1]) == status
    assert headers["content-type"] == "application/json"
    assert (error["code"], set(error)) == (code, {"message", "type", "param", "code"})
    assert ("retry-after" in headers) == has_retry


def test_health_probe_of_kuberay_is_left_alone(proxy: Rendered) -> None:
    line, headers, _ = exchange(proxy.port, get("/-/healthz"))
    assert int(line.split()[1]) in (200, 503)
    assert headers["content-type"] == "text/plain"


@pytest.mark.slow
def test_dribbled_header_is_cut_off_with_408(proxy: Rendered) -> None:
    began = time.monotonic()
    line, _, _ = exchange(proxy.port, b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
    assert int(line.split()[1]) == 408
    assert time.monotonic() - began > HEADER_TIMEOUT_S - 1
