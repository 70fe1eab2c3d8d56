"""Rank 0's side of the token stream: it calls home to each ingress and sends one frame a step.

Lives on the shard's I/O loop, beside the engine thread, which never waits for it: what the engine
made of a step is handed over and encoded here. One connection per ingress process, kept for all
its later requests. An ingress that reads too slowly is dropped and its streams end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from serve.errors import ErrorInfo
from serve.messages import Abort, Hello, Load, Lost, StreamAddress, TokenDelta, TokenFrame
from serve.transport.connection import Connection, dial
from serve.transport.frames import encode_frame

HEARTBEAT_S = 0.5
MAX_BACKLOG_BYTES = 8 * 1024 * 1024

_decoder = msgspec.msgpack.Decoder(Abort)


class _Link:
    """The way to one ingress process: frames wait in `queued` until it is dialled."""

    __slots__ = ("connection", "key", "num_queued_bytes", "queued", "stream_ids")

    def __init__(self, key: tuple[str, bytes]) -> None:
        self.key = key
        self.connection: Connection | None = None
        self.queued: list[bytes] = []
        self.num_queued_bytes = 0
        self.stream_ids: set[int] = set()


class TokenStreams:
    """Routes each stream's deltas to the ingress that asked; all methods run on one event loop.

    `on_abort(stream_id)` is called for each stream that nobody reads any more.
    """

    def __init__(self, *, replica_id: str, on_abort: Callable[[int], None]) -> None:
        self._replica_id = replica_id
        self._on_abort = on_abort
        self._links: dict[tuple[str, bytes], _Link] = {}
        self._link_of_stream: dict[int, _Link] = {}
        self._dialling: set[asyncio.Task[None]] = set()
        self._load = Load()

    def open(self, stream: StreamAddress) -> None:
        """A request is about to run: make sure that there is a way to its ingress."""
        key = (stream.address, stream.secret)
        link = self._links.get(key)
        if link is None:
            link = self._links[key] = _Link(key)
            task = asyncio.get_running_loop().create_task(self._dial(link))
            self._dialling.add(task)
            task.add_done_callback(self._dialling.discard)
        link.stream_ids.add(stream.stream_id)
        self._link_of_stream[stream.stream_id] = link

    def close(self, stream_id: int) -> None:
        """A stream had its last delta."""
        link = self._link_of_stream.pop(stream_id, None)
        if link is not None:
            link.stream_ids.discard(stream_id)

    def deliver(self, deltas: Iterable[TokenDelta], load: Load) -> None:
        """Send a step's tokens: one frame for each ingress that has any."""
        self._load = load
        by_link: dict[_Link, list[TokenDelta]] = {}
        for delta in deltas:
            link = self._link_of_stream.get(delta.stream_id)
            if link is not None:
                by_link.setdefault(link, []).append(delta)
        for link, some in by_link.items():
            self._send(link, encode_frame(TokenFrame(load, some)))

    def beat(self) -> None:
        """Send a heartbeat to each ingress that heard nothing for a while."""
        now = asyncio.get_running_loop().time()
        frame = encode_frame(TokenFrame(self._load, []))
        for link in list(self._links.values()):
            connection = link.connection
            if connection is not None and now - connection.last_sent_s >= HEARTBEAT_S * 0.9:
                self._send(link, frame)

    def lose_all(self, error: ErrorInfo) -> None:
        """This shard goes: every stream ends, said at once on every connection."""
        frame = encode_frame(Lost(error))
        for link in self._links.values():
            if link.connection is not None:
                link.connection.send_frame(frame)

    def _send(self, link: _Link, frame: bytes) -> None:
        connection = link.connection
        if connection is None:
            link.queued.append(frame)
            link.num_queued_bytes += len(frame)
            if link.num_queued_bytes > MAX_BACKLOG_BYTES:  # a dial that hangs
                self._drop(link)
            return
        if connection.backlog_bytes > MAX_BACKLOG_BYTES:
            connection.close()
            return
        connection.send_frame(frame)

    async def _dial(self, link: _Link) -> None:
        address, secret = link.key

        def make() -> Connection:
            return Connection(_decoder, self._on_message, lambda _: self._drop(link))

        try:
            connection = await dial(address, make)
        except (OSError, ValueError):
            self._drop(link)
            return
        if self._links.get(link.key) is not link:  # dropped meanwhile
            connection.close()
            return
        connection.send(Hello(secret, self._replica_id))
        link.connection = connection
        for frame in link.queued:
            connection.send_frame(frame)
        link.queued.clear()

    def _on_message(self, connection: Connection, message: Any) -> None:
        assert isinstance(message, Abort)
        self._on_abort(message.stream_id)

    def _drop(self, link: _Link) -> None:
        self._links.pop(link.key, None)
        for stream_id in list(link.stream_ids):
            self._link_of_stream.pop(stream_id, None)
            self._on_abort(stream_id)
        link.stream_ids.clear()
