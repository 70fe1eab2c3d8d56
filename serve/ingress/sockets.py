"""Where the engines call home: the token sockets of one ingress process.

Accepts connections that prove this process' secret, gives each delta to its stream, and answers a
frame of an unknown stream with an abort, so that no engine works for a client that has gone. A
connection that is silent for `SILENCE_S` is dead, whatever TCP thinks.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import os
import secrets
from collections.abc import Callable
from typing import Any

import msgspec

from serve.errors import ErrorInfo, ReplicaLostError, ShoalError, from_info
from serve.ingress.stream import TokenStream
from serve.messages import (
    Abort,
    Hello,
    Load,
    Lost,
    StreamAddress,
    StreamMessage,
    TokenDelta,
    TokenFrame,
)
from serve.transport.address import Address
from serve.transport.connection import Connection, listen

SILENCE_S = 3.0
_GONE = ErrorInfo(ReplicaLostError.code, "the replica is gone; try again", 1.0)

_decoder: msgspec.msgpack.Decoder[StreamMessage] = msgspec.msgpack.Decoder(StreamMessage)


class _Open:
    """A stream that this process waits for; `connection` is that of its first frame."""

    __slots__ = ("connection", "stream")

    def __init__(self, stream: TokenStream) -> None:
        self.stream = stream
        self.connection: Connection | None = None


class TokenSockets:
    """Streams of this process by id, and the connections that feed them. One event loop.

    `on_load(replica_id, load)` is called for every frame, `on_lost(replica_id)` when a replica's
    connection ends.
    """

    def __init__(
        self,
        *,
        socket_dir: str,
        host: str,
        on_load: Callable[[str, Load], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._socket_dir = socket_dir
        self._host = host
        self._on_load = on_load
        self._on_lost = on_lost
        self._secret = secrets.token_bytes(32)
        self._address = ""
        self._path = ""
        self._servers: list[asyncio.Server] = []
        # Random in the upper half: no two processes, before or after a restart, share an id.
        self._next_id = itertools.count(secrets.randbits(31) << 32).__next__
        self._open: dict[int, _Open] = {}
        self._replica_of: dict[Connection, str] = {}
        self._connection_of: dict[str, Connection] = {}
        self._abort_later: dict[str, list[int]] = {}
        self._watch: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Listen on a Unix socket for this node and on TCP for others."""
        self._path = os.path.join(self._socket_dir, f"i{secrets.token_hex(6)}")
        addresses = []
        for wanted in (Address(path=self._path), Address(host=self._host)):
            server, address = await listen(wanted, self._make_connection)
            self._servers.append(server)
            addresses.append(str(address))
        self._address = ",".join(addresses)
        self._check_silence()

    def stop(self) -> None:
        """Stop listening; every open stream fails."""
        if self._watch is not None:
            self._watch.cancel()
        for server in self._servers:
            server.close()
        for connection in list(self._replica_of):
            connection.close()
        for stream_id in list(self._open):
            self.fail(stream_id, from_info(_GONE))
        if self._path and os.path.exists(self._path):
            os.unlink(self._path)

    @property
    def num_open(self) -> int:
        """Streams that are not over."""
        return len(self._open)

    def new_address(self) -> StreamAddress:
        """An address for one attempt of one request."""
        return StreamAddress(self._address, self._secret, self._next_id())

    def expect(self, stream_id: int, stream: TokenStream) -> None:
        """Frames of `stream_id` go to `stream` from now on."""
        self._open[stream_id] = _Open(stream)

    def fail(self, stream_id: int, error: ShoalError) -> None:
        """The stream is over for a reason that no frame will tell."""
        waiting = self._open.pop(stream_id, None)
        if waiting is not None:
            waiting.stream.fail(error)

    def abort(self, stream_id: int, replica_id: str) -> None:
        """Nobody reads `stream_id` any more: tell its replica, now or as soon as it calls home.

        Where the replica is not known yet (""), its first frame will be answered with an abort.
        """
        self._open.pop(stream_id, None)
        connection = self._connection_of.get(replica_id)
        if connection is not None:
            connection.send(Abort(stream_id))
        elif replica_id:
            self._abort_later.setdefault(replica_id, []).append(stream_id)

    def _make_connection(self) -> Connection:
        connection = Connection(_decoder, self._on_message, self._on_connection_lost)
        self._replica_of[connection] = ""  # until it proves the secret
        return connection

    def _on_message(self, connection: Connection, message: Any) -> None:
        replica_id = self._replica_of.get(connection)
        if not replica_id:
            self._greet(connection, message)
        elif isinstance(message, TokenFrame):
            self._on_load(replica_id, message.load)
            for delta in message.deltas:
                self._feed(connection, delta)
        elif isinstance(message, Lost):
            self._lose(connection, message.error)
            self._on_lost(replica_id)

    def _greet(self, connection: Connection, message: Any) -> None:
        if isinstance(message, Hello) and hmac.compare_digest(message.secret, self._secret):
            self._replica_of[connection] = message.replica_id
            self._connection_of[message.replica_id] = connection
            for stream_id in self._abort_later.pop(message.replica_id, ()):
                connection.send(Abort(stream_id))
        else:
            connection.close()

    def _feed(self, connection: Connection, delta: TokenDelta) -> None:
        waiting = self._open.get(delta.stream_id)
        if waiting is None:
            if delta.finish_reason is None:
                connection.send(Abort(delta.stream_id))
            return
        if waiting.connection is None:
            waiting.connection = connection
        elif waiting.connection is not connection:
            return
        stream = waiting.stream
        stream.feed(delta)
        if stream.is_over:
            del self._open[delta.stream_id]

    def _on_connection_lost(self, connection: Connection) -> None:
        replica_id = self._replica_of.pop(connection, None)
        if not replica_id:
            return
        if self._connection_of.get(replica_id) is connection:
            del self._connection_of[replica_id]
        self._lose(connection, _GONE)
        self._on_lost(replica_id)

    def _lose(self, connection: Connection, error: ErrorInfo) -> None:
        ended = [key for key, waiting in self._open.items() if waiting.connection is connection]
        for stream_id in ended:
            self.fail(stream_id, from_info(error))

    def _check_silence(self) -> None:
        loop = asyncio.get_running_loop()
        for connection in list(self._replica_of):
            if loop.time() - connection.last_received_s > SILENCE_S:
                connection.close()
        self._watch = loop.call_later(SILENCE_S / 6, self._check_silence)
