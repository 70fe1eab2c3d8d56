"""A client that opens many streams at once and counts what arrives, with as little CPU as it can.

Raw sockets on one event loop: an HTTP library's client would cost more than the server it measures.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class StreamResult:
    """One stream: events before the end, seconds to the first of them, and how it ended."""

    num_events: int = 0
    first_event_s: float = 0.0
    total_s: float = 0.0
    is_done: bool = False


class _Reader(asyncio.Protocol):
    """Counts `data:` lines without parsing them."""

    def __init__(self, request: bytes, done: asyncio.Future[StreamResult]) -> None:
        self._request = request
        self._done = done
        self._result = StreamResult()
        self._tail = b""
        self._began_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        self._began_s = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        result = self._result
        text = self._tail + data
        num_events = text.count(b"data: {")
        if num_events and result.num_events == 0:
            result.first_event_s = time.perf_counter() - self._began_s
        result.num_events += num_events
        self._tail = text[-6:] if not text.endswith(b"\n") else b""
        if b"data: [DONE]" in text:
            result.is_done = True
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._result.total_s = time.perf_counter() - self._began_s
        if not self._done.done():
            self._done.set_result(self._result)


def completion_request(port: int, *, num_tokens: int, **fields: Any) -> bytes:
    """A streamed `POST /v1/completions` as bytes."""
    body = json.dumps(
        {"prompt": "hello", "max_tokens": num_tokens, "stream": True, "ignore_eos": True, **fields}
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body


async def run_streams(
    port: int, *, num_streams: int, num_tokens: int, **fields: Any
) -> list[StreamResult]:
    """Open `num_streams` streams at once, with `fields` in each body, and read them to the end."""
    loop = asyncio.get_running_loop()
    request = completion_request(port, num_tokens=num_tokens, **fields)
    waiting = []
    for _ in range(num_streams):
        done: asyncio.Future[StreamResult] = loop.create_future()
        waiting.append(done)
        await loop.create_connection(
            lambda done=done: _Reader(request, done),  # type: ignore[misc]
            "127.0.0.1",
            port,
        )
    return await asyncio.gather(*waiting)
