"""What pods run before they stop, and in `helm test`."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest

from cluster.drain import OPEN_REQUESTS, drain, num_open_requests, read_metrics
from cluster.trial import try_release

METRICS = """\
# HELP ray_serve_replica_processing_queries The current number of queries being processed.
# TYPE ray_serve_replica_processing_queries gauge
ray_serve_replica_processing_queries{application="shoal",replica="a"} 2.0
ray_serve_replica_processing_queries{application="model-x",replica="b"} 1.0
ray_serve_replica_processing_queries_other 7.0
"""


def test_open_requests_of_every_replica_count() -> None:
    assert num_open_requests(METRICS) == 3
    assert num_open_requests("") == 0


def test_drain_waits_while_streams_run_and_for_late_figures() -> None:
    texts = [METRICS, "", METRICS, "", "", ""]
    slept: list[float] = []
    assert drain(lambda: texts.pop(0), slept.append) == "no request is open"
    assert texts == []
    assert len(slept) == 6


def test_drain_ends_where_ray_is_gone() -> None:
    slept: list[float] = []
    assert drain(lambda: None, slept.append) == "Ray has stopped already"
    assert len(slept) == 3


def test_drain_takes_a_missed_answer_for_no_answer() -> None:
    texts = [METRICS, None, None, METRICS, "", None, "", ""]
    assert drain(lambda: texts.pop(0), lambda _: None) == "no request is open"
    assert texts == []


def test_metrics_are_asked_for_past_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with api(key="") as url:
        monkeypatch.setattr("cluster.drain.METRICS_URL", f"{url}/metrics")
        assert read_metrics() is not None


def test_metric_is_one_that_ray_serve_exports() -> None:
    ray = find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    source = Path(ray.origin).parent / "serve" / "_private" / "replica.py"
    name = OPEN_REQUESTS.removeprefix("ray_")
    assert f'"{name}"' in source.read_text(encoding="utf-8")


@contextmanager
def api(*, key: str, is_ready: bool = True) -> Iterator[str]:
    """An API of that key on loopback; its address."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: object) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            if self.path == "/health/ready":
                self.answer(200 if is_ready else 503, {})
            else:
                self.protected({"data": [{"id": "m"}]})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.protected({"choices": [{"message": {"content": "hello"}}]})

        def protected(self, body: object) -> None:
            is_known = self.headers["Authorization"] == f"Bearer {key}" or not key
            self.answer(200 if is_known else 401, body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("key", "given", "found"),
    [
        ("", "", "it answers: 'hello'"),
        ("k", "k", "it answers: 'hello'"),
        ("k", "", "asks for a key"),
    ],
)
def test_trial_of_a_release(key: str, given: str, found: str) -> None:
    with api(key=key) as url:
        assert found in try_release(url, seconds=60, key=given)


def test_trial_takes_garbage_for_not_ready() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"garbage\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(RuntimeError, match="not ready after 0 s: 0 garbage"):
            try_release(f"http://127.0.0.1:{server.getsockname()[1]}", seconds=0, key="")
        thread.join()


def test_trial_fails_with_what_it_saw() -> None:
    with api(key="k") as url, pytest.raises(RuntimeError, match="no answer: 401"):
        try_release(url, seconds=60, key="wrong")
    with api(key="", is_ready=False) as url, pytest.raises(RuntimeError, match=r"not ready.* 503"):
        try_release(url, seconds=0, key="")
