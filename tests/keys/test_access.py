"""Who may use the API is decided before anything starts; commands bring a key of their own."""

import os
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.access import FIRST_KEY_NAME, decide_access
from cluster.chat import AnswerStream, Message
from cluster.cli.question import Question
from cluster.cli.up import plan_deployment
from cluster.errors import DeniedError, UsageError
from cluster.keys import FileStore, create_key, default_path, list_keys
from cluster.local.addresses import contact_host, listening_addresses, url_of
from cluster.local.folder import RunFolder, create_run
from cluster.local.ports import find_free_ports, listening_error
from cluster.plan import Options
from serve.config import HttpConfig
from serve.keys import ApiKey, KeyRing, hash_key, render_keys

ROOT = Path(__file__).resolve().parents[2]
BEYOND = ["0.0.0.0", "::", "192.168.1.5", "box.example.org"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty configuration folder of the user's."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("SHOAL_API_KEY", raising=False)
    return tmp_path


def write_expired(path: Path) -> None:
    past = datetime.now(UTC) - timedelta(days=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_keys([ApiKey("old", hash_key("x"), past, past)]))


def test_loopback_is_open_as_ever_even_beside_a_file_of_keys() -> None:
    create_key(FileStore(default_path()), "me")
    for host in ("127.0.0.1", "::1"):
        access = decide_access(HttpConfig(host=host))
        assert (access.has_keys, access.is_open_to_anyone) == (False, False)


@pytest.mark.parametrize("host", BEYOND)
def test_beyond_loopback_without_a_key_is_refused_with_every_way_out(host: str) -> None:
    with pytest.raises(UsageError, match=f"http.host {host} can be reached") as caught:
        decide_access(HttpConfig(host=host))
    for way in ("shoal keys create NAME", "--new-key", "--allow-anonymous"):
        assert way in caught.value.hint


@pytest.mark.parametrize("host", BEYOND)
def test_beyond_loopback_the_user_s_own_keys_are_needed(host: str) -> None:
    create_key(FileStore(default_path()), "me")
    access = decide_access(HttpConfig(host=host))
    assert access.http.keys_file == default_path()
    assert (access.has_keys, access.new_key) == (True, None)


def test_keys_that_have_expired_let_nobody_in_and_so_do_not_count() -> None:
    write_expired(default_path())
    with pytest.raises(UsageError, match=r"no API key in .* works"):
        decide_access(HttpConfig(host="0.0.0.0"))
    with pytest.raises(UsageError, match=r"every key in .* has expired"):
        decide_access(HttpConfig(host="0.0.0.0"), wants_new_key=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_file_of_the_configuration_counts_everywhere(home: Path, host: str) -> None:
    path = home / "mine.yaml"
    http = HttpConfig(host=host, keys_file=path)
    with pytest.raises(UsageError, match="every request would be refused") as caught:
        decide_access(http)
    assert f"shoal keys create NAME --file {path}" in caught.value.hint
    create_key(FileStore(path), "me")
    assert decide_access(http).http == http


def test_a_broken_file_is_named_with_its_line() -> None:
    default_path().parent.mkdir(parents=True)
    default_path().write_text("keys:\n- oops\n")
    with pytest.raises(UsageError, match=r"keys\.yaml:2: must be a mapping"):
        decide_access(HttpConfig(host="0.0.0.0"))


def test_anonymous_is_said_in_so_many_words() -> None:
    access = decide_access(HttpConfig(host="0.0.0.0", allow_anonymous=True))
    assert (access.has_keys, access.is_open_to_anyone) == (False, True)
    with pytest.raises(UsageError, match="exclude each other"):
        decide_access(HttpConfig(allow_anonymous=True), wants_new_key=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_new_key_is_made_once_and_opens(host: str) -> None:
    first = decide_access(HttpConfig(host=host), wants_new_key=True)
    assert first.new_key is not None
    assert first.http.keys_file == default_path()
    assert KeyRing(default_path()).find(first.new_key) == FIRST_KEY_NAME
    again = decide_access(HttpConfig(host=host), wants_new_key=True)
    assert (again.new_key, again.http) == (None, first.http)
    assert len(list_keys(FileStore(default_path()))) == 1


def test_what_is_deployed_carries_the_decision(home: Path) -> None:
    (port,) = find_free_ports(1)
    options = Options(host="0.0.0.0", port=port)
    deployment, access, _ = plan_deployment(None, options, wants_new_key=True)
    ingress = next(app for app in deployment.body["applications"] if app["name"] == "shoal")
    assert ingress["args"]["http"] == {
        "host": "0.0.0.0",
        "port": port,
        "keys_file": str(default_path()),
    }
    assert (deployment.host, deployment.contact_host) == ("0.0.0.0", "127.0.0.1")
    assert access.new_key is not None
    assert access.new_key not in str(deployment.body)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="HAProxy is for Linux")
def test_behind_the_proxy_everything_listens_on_loopback() -> None:
    (port,) = find_free_ports(1)
    options = Options(host="0.0.0.0", port=port, allow_anonymous=True)
    deployment, *_ = plan_deployment(None, options, wants_new_key=False)
    assert deployment.local_body()["http_options"] == {"host": "127.0.0.1", "port": port}
    assert deployment.body["http_options"]["host"] == "0.0.0.0"


@pytest.mark.parametrize(
    ("host", "message"),
    [("8.8.8.8", "nothing can listen on port"), ("no.invalid", "nothing can listen on port")],
)
def test_a_host_that_is_not_this_machine_s_is_refused(host: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        plan_deployment(None, Options(host=host), wants_new_key=True)
    assert "must be an address of this machine" in caught.value.hint
    assert not default_path().exists()  # no key is made for a start that cannot be


def test_a_taken_port_is_seen_on_loopback_and_everywhere() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert listening_error("127.0.0.1", port) is not None
        assert listening_error("0.0.0.0", port) is not None
    (free,) = find_free_ports(1)
    assert listening_error("0.0.0.0", free) is None


def test_a_taken_port_of_a_name_is_seen() -> None:
    """At the first of its addresses: 127.0.0.1 or ::1, as the machine has it."""
    family, *_, address = socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)[0]
    with socket.create_server(address[:2], family=family) as server:
        assert listening_error("localhost", server.getsockname()[1]) is not None


def test_a_wildcard_is_reached_over_loopback_and_shown_by_its_addresses() -> None:
    assert [contact_host(host) for host in ("0.0.0.0", "::", "::1", "box")] == [
        "127.0.0.1",
        "127.0.0.1",
        "::1",
        "box",
    ]
    shown = listening_addresses("0.0.0.0")
    assert shown[0] == "127.0.0.1"
    assert not [address for address in shown if ":" in address]
    assert listening_addresses("192.168.1.5") == ["192.168.1.5"]
    assert url_of("::1", 80) == "http://[::1]:80"
    assert url_of("127.0.0.1", 80) == "http://127.0.0.1:80"


# --- commands and their own key ------------------------------------------------------------------


def test_a_question_takes_the_new_key_or_the_user_s_and_is_refused_before_the_start(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = decide_access(HttpConfig(host="0.0.0.0"), wants_new_key=True)
    assert access.new_key is not None
    assert Question.prepare(access, None).api_key == access.new_key
    later = decide_access(HttpConfig(host="0.0.0.0"))
    with pytest.raises(DeniedError, match="needs an API key"):
        Question.prepare(later, None)
    monkeypatch.setenv("SHOAL_API_KEY", "sk-wrong")
    with pytest.raises(DeniedError, match="does not know this API key"):
        Question.prepare(later, None)
    (home / "mine").write_text(access.new_key + "\n")
    assert Question.prepare(later, home / "mine").api_key == access.new_key
    assert Question.prepare(decide_access(HttpConfig()), None).api_key is None


class _Locked(BaseHTTPRequestHandler):
    """Answers 401 to all but one key, like the server behind keys."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        is_granted = self.headers.get("Authorization") == "Bearer sk-right"
        self.send_response(200 if is_granted else 401)
        self.end_headers()
        if is_granted and self.command == "POST":
            self.wfile.write(b'data: {"choices":[{"delta":{"content":"hi"}}]}\n\ndata: [DONE]\n\n')

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        return None


@pytest.fixture
def locked() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Locked)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def run(locked: int) -> Iterator[RunFolder]:
    run = create_run(f"t{uuid.uuid4().hex[:8]}")
    run.update(port=locked, host="0.0.0.0", phase="ready", models=("m",))
    yield run
    run.remove()


@pytest.mark.parametrize(
    ("api_key", "message"), [(None, "needs an API key"), ("sk-wrong", "does not know this API key")]
)
def test_a_stream_without_the_right_key_says_so_in_one_line(
    locked: int, api_key: str | None, message: str
) -> None:
    turns = [Message("user", "hello")]
    with (
        AnswerStream("127.0.0.1", locked, turns, api_key=api_key) as answer,
        pytest.raises(DeniedError, match=message),
    ):
        next(iter(answer))


@pytest.mark.parametrize(
    ("api_key", "exit_code", "output"),
    [("", 1, ""), ("sk-wrong", 1, ""), ("sk-right", 0, "hi")],
)
def test_chat_needs_the_right_key_and_shows_none(
    run: RunFolder, api_key: str, exit_code: int, output: str
) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "cluster", "chat", "--name", run.state.name],
        input="hello\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        env={**os.environ, "SHOAL_API_KEY": api_key},
    )
    assert result.returncode == exit_code
    assert output in result.stdout
    assert ("API key" in result.stderr) == (exit_code == 1)
    assert "sk-" not in result.stdout + result.stderr
