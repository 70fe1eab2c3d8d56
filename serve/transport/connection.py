"""An asyncio connection that speaks frames, and how to listen for and dial one.

Sending never blocks and never waits: what the kernel does not take is kept, and whoever sends
looks at `backlog_bytes` to decide when a reader is too slow to keep. The engine's tokens depend on
that.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from typing import Any, cast

import msgspec

from serve.transport.address import Address
from serve.transport.frames import FrameDecoder, FrameError, encode_frame


class Connection(asyncio.Protocol):
    """One end of a frame connection.

    `on_message(connection, message)` is called for each message and `on_lost(connection)` once at
    the end, on the event loop; an exception of `on_message` closes the connection.
    """

    def __init__(
        self,
        decoder: msgspec.msgpack.Decoder[Any],
        on_message: Callable[[Connection, Any], None],
        on_lost: Callable[[Connection], None],
    ) -> None:
        self._frames = FrameDecoder(decoder)
        self._on_message = on_message
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self.is_lost = False
        self._time = asyncio.get_running_loop().time
        self.last_received_s = self.last_sent_s = self._time()

    @property
    def backlog_bytes(self) -> int:
        """Bytes that wait for the reader."""
        transport = self._transport
        return 0 if transport is None else transport.get_write_buffer_size()

    @property
    def peer_pid(self) -> int | None:
        """The process at the other end of a Unix socket, as the system has it; else None."""
        connected = None if self._transport is None else self._transport.get_extra_info("socket")
        if connected is None or connected.family != socket.AF_UNIX:
            return None
        size = struct.calcsize("3i")
        found = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        pid: int = struct.unpack("3i", found)[0]
        return pid if pid > 0 else None  # 0: in another container

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        if self.is_lost:  # closed before it was made
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self.last_received_s = self._time()
        try:
            for message in self._frames.feed(data):
                self._on_message(self, message)
                if self.is_lost:
                    return
        except FrameError:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.is_lost:
            self.is_lost = True
            self._on_lost(self)

    def send(self, message: msgspec.Struct) -> None:
        """Send one message; on a lost connection nothing happens."""
        self.send_frame(encode_frame(message))

    def send_frame(self, frame: bytes) -> None:
        """Send an encoded frame."""
        if self._transport is not None and not self.is_lost:
            self.last_sent_s = self._time()
            self._transport.write(frame)

    def close(self) -> None:
        """End the connection now, whatever waits; `on_lost` is called at once."""
        if self._transport is not None:
            self._transport.abort()
        self.connection_lost(None)


async def listen(
    address: Address, make_connection: Callable[[], Connection]
) -> tuple[asyncio.Server, Address]:
    """Listen; returns the server and the address with the port that was chosen for port 0."""
    loop = asyncio.get_running_loop()
    if address.path:
        server = await loop.create_unix_server(make_connection, address.path, backlog=128)
        os.chmod(address.path, 0o600)
        return server, address
    server = await loop.create_server(make_connection, address.host, address.port, backlog=128)
    return server, Address(host=address.host, port=server.sockets[0].getsockname()[1])


async def dial(addresses: str, make_connection: Callable[[], Connection]) -> Connection:
    """Connect to the first of `addresses` (comma-separated) that answers.

    Raises:
        OSError: nobody listens at any of them.
    """
    loop = asyncio.get_running_loop()
    failures = []
    for address in Address.parse_all(addresses):
        try:
            if address.path:
                _, link = await loop.create_unix_connection(make_connection, address.path)
            else:
                _, link = await loop.create_connection(make_connection, address.host, address.port)
        except OSError as exc:
            failures.append(f"{address}: {exc}")
        else:
            return link
    raise ConnectionRefusedError("; ".join(failures))
