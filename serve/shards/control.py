"""A shard's link to its replica, and the event loop on which all of a shard's sockets live.

One thread with one event loop per shard; the engine (or the follower's loop) has another. What
crosses between the two goes through `call` (into the loop) and the inbox (out of it). The end of
the control socket means that the replica is gone: the shard says "lost" and exits, nobody waits
for Ray to kill it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import msgspec

from serve.messages import ReplicaMessage
from serve.transport.connection import Connection, dial

_decoder: msgspec.msgpack.Decoder[ReplicaMessage] = msgspec.msgpack.Decoder(ReplicaMessage)


class ControlLink:
    """The shard's connection to its replica on an event loop of its own thread.

    `on_message(message)` and `on_lost()` run on that loop, and so does `on_broken(exc)` when
    something that was called on the loop raised: tokens may be lost then, so the shard must not go
    on as if nothing had happened.
    """

    def __init__(
        self,
        address: str,
        on_message: Callable[[Any], None],
        on_lost: Callable[[], None],
        on_broken: Callable[[BaseException], None],
    ) -> None:
        self._address = address
        self._on_message = on_message
        self._on_lost = on_lost
        self._connection: Connection | None = None
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(
            lambda _, context: on_broken(
                context.get("exception") or RuntimeError(context["message"])
            )
        )
        self._thread = threading.Thread(target=self.loop.run_forever, name="io", daemon=True)

    def start(self, hello: msgspec.Struct, *, timeout_s: float = 10.0) -> None:
        """Connect and say who we are.

        Raises:
            OSError: the replica does not listen any more.
        """
        self._thread.start()
        future = asyncio.run_coroutine_threadsafe(self._connect(hello), self.loop)
        future.result(timeout_s)

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Run `function` on the I/O loop soon; from any thread, in order."""
        self.loop.call_soon_threadsafe(function, *args)

    def send(self, message: msgspec.Struct) -> None:
        """Send to the replica; from any thread, in order."""
        self.call(self.send_now, message)

    def send_now(self, message: msgspec.Struct) -> None:
        """Send to the replica; on the I/O loop."""
        if self._connection is not None:
            self._connection.send(message)

    def flush(self, *, timeout_s: float = 0.5) -> None:
        """Wait until what was sent before is with the kernel, at most `timeout_s`."""
        done = threading.Event()
        self.call(done.set)
        done.wait(timeout_s)

    async def _connect(self, hello: msgspec.Struct) -> None:
        def make() -> Connection:
            return Connection(
                _decoder, lambda _, message: self._on_message(message), lambda _: self._on_lost()
            )

        self._connection = await dial(self._address, make)
        self._connection.send(hello)
