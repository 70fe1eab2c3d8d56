from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from cluster.chat import AnswerStream, Message
from cluster.errors import CommandError
from cluster.local.ports import find_free_ports

Serve = Callable[..., int]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Answers one POST with the given status and body; returns its port."""
    servers: list[tuple[HTTPServer, threading.Thread]] = []

    def start(body: str, *, status: int = 200) -> int:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                return None

        server = HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        servers.append((server, thread))
        return int(server.server_address[1])

    yield start
    for server, thread in servers:
        thread.join(timeout=60)
        server.server_close()


def ask(port: int) -> list[str]:
    with AnswerStream("127.0.0.1", port, [Message("user", "hi")]) as answer:
        return list(answer)


def test_pieces_arrive_in_order_and_comments_and_empty_deltas_do_not(serve: Serve) -> None:
    body = (
        ': keep-alive\n\ndata: {"choices":[{"delta":{"role":"assistant"}}]}\n\n'
        'data: {"choices":[{"delta":{"content":"你"}}]}\n\n'
        'data: {"choices":[{"delta":{"content":"好"},"finish_reason":"stop"}]}\n\n'
        'data: {"choices":[],"usage":{}}\n\ndata: [DONE]\n\n'
    )
    assert ask(serve(body)) == ["你", "好"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ('{"error":{"message":"the queue is full"}}', 429, "^the queue is full$"),
        ("<html>", 502, "^<html>$"),
        ('data: {"error":{"message":"its shard died"}}\n\n', 200, "^its shard died$"),
        ('data: {"choices":[]}\n\n', 200, "cut off"),
    ],
)
def test_refusal_failure_and_cut_are_errors_in_the_servers_words(
    serve: Serve, body: str, status: int, message: str
) -> None:
    port = serve(body, status=status)
    with pytest.raises(CommandError, match=message):
        ask(port)


def test_absent_server_is_an_error() -> None:
    with pytest.raises(CommandError, match="cannot be reached"):
        ask(find_free_ports(1)[0])
