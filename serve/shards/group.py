"""The shards of one replica: make them, connect them, notice at once when one is gone.

Runs in the replica's process, on its event loop, without torch. A group is made once and thrown
away whole: after the loss of any shard nothing of it is reused. Three signs of a death, whichever
comes first: the end of a control socket, the sentinel call's error, a shard's own last word. A
shard that neither dies nor runs (a process that was stopped, a machine that is paused) is known by
its silence: a ready one says every heartbeat that it runs. Where this process was paused itself,
perhaps with all the others, it listens anew before it calls anybody silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from serve.errors import ErrorInfo, NotReadyError, ReplicaLostError, from_info
from serve.messages import (
    Peers,
    ShardBeat,
    ShardFailed,
    ShardHello,
    ShardMessage,
    ShardProgress,
    ShardReady,
    Shutdown,
)
from serve.shards.spec import ShardSpec
from serve.shards.streams import HEARTBEAT_S
from serve.transport.address import Address
from serve.transport.connection import Connection, listen

logger = logging.getLogger("shoal.replica")

_decoder: msgspec.msgpack.Decoder[ShardMessage] = msgspec.msgpack.Decoder(ShardMessage)

# A shard that dies of a dead neighbour says so too: wait this long for the one with the cause.
ROOT_CAUSE_WAIT_S = 0.3
# A shard that said nothing for so long when its group ends may not hear that it is to end.
FROZEN_S = 3 * HEARTBEAT_S
NUM_SILENCE_CHECKS = 60  # within the time that a shard may be silent
OWN_PAUSE_SHARE = 0.25  # of that time, between two checks: this process did not run


class ShardHandle(Protocol):
    """What a group needs of an actor."""

    async def watch(self) -> None:
        """Returns or raises when the actor has ended."""
        ...

    def kill(self) -> None:
        """End it now."""
        ...


class ShardGroup:
    """One generation of a replica's shards.

    `start_shard(spec)` makes one actor, in a thread: Ray answers when its GCS does, and meanwhile
    open calls have to hear that they are lost. `on_message(message)` gets what rank 0 says of
    requests and load; `on_progress(message)` start-up progress; `on_lost(error)` is called once,
    when the group is of no more use after it was ready.
    """

    def __init__(
        self,
        *,
        specs: Callable[[str, bytes], list[ShardSpec]],
        start_shard: Callable[[ShardSpec], ShardHandle],
        on_message: Callable[[Any], None],
        on_progress: Callable[[ShardProgress], None],
        on_lost: Callable[[ErrorInfo], None],
        socket_dir: str,
        host: str,
    ) -> None:
        self._make_specs = specs
        self._start_shard = start_shard
        self._on_message = on_message
        self._on_progress = on_progress
        self._on_lost = on_lost
        self._socket_dir = socket_dir
        self._host = host
        self._secret = secrets.token_bytes(32)
        self._servers: list[asyncio.Server] = []
        self._path = ""
        self._shards: list[ShardHandle] = []
        self._watchers: list[asyncio.Task[None]] = []
        self._connections: dict[Connection, int] = {}
        self._strangers: set[Connection] = set()
        self._root: Connection | None = None
        self._group_address: str | None = None
        self._ready: dict[int, ShardReady] = {}
        self._failures: list[ErrorInfo] = []
        self._num_shards = 0
        self._silence_s = 0.0
        self._listens_since_s = self._checked_s = 0.0
        self._is_ready: asyncio.Future[None] | None = None
        self.is_over = False

    @property
    def ready(self) -> dict[int, ShardReady]:
        """What each rank said when it was ready."""
        return self._ready

    async def start(self, *, timeout_s: float) -> None:
        """Make the shards and wait until all are ready.

        Raises:
            ShoalError: the root cause that a shard gave, or that it was too slow.
        """
        self._is_ready = asyncio.get_running_loop().create_future()
        specs = self._make_specs(await self._listen(), self._secret)
        self._num_shards = len(specs)
        self._silence_s = specs[0].silence_s
        for spec in specs:
            shard = await asyncio.to_thread(self._start_shard, spec)
            self._shards.append(shard)
            self._watchers.append(asyncio.create_task(self._watch(spec.rank, shard)))
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self._is_ready)
        except TimeoutError:
            missing = sorted(set(range(self._num_shards)) - set(self._ready))
            raise NotReadyError(f"shards {missing} were not ready within {timeout_s:g} s") from None

    def send(self, message: msgspec.Struct) -> None:
        """Tell rank 0."""
        if self._root is not None:
            self._root.send(message)

    def stop(self) -> None:
        """End every shard of this group now; nothing of it is heard any more."""
        self.is_over = True
        for watcher in self._watchers:
            watcher.cancel()
        for connection in self._connections:
            if time.monotonic() - connection.last_received_s > FROZEN_S:
                _kill(connection.peer_pid)
        for connection in [*self._connections, *self._strangers]:
            connection.send(Shutdown())
            connection.close()
        for shard in self._shards:
            shard.kill()
        for server in self._servers:
            server.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def disconnect(self) -> None:
        """Only close the control sockets, as the end of this process would."""
        self.is_over = True
        for connection in list(self._connections):
            connection.close()

    async def _listen(self) -> str:
        def make() -> Connection:
            connection = Connection(_decoder, self._on_shard_message, self._on_connection_lost)
            self._strangers.add(connection)
            return connection

        self._path = os.path.join(self._socket_dir, f"c{secrets.token_hex(6)}")
        addresses = []
        for wanted in (Address(path=self._path), Address(host=self._host)):
            server, address = await listen(wanted, make)
            self._servers.append(server)
            addresses.append(str(address))
        return ",".join(addresses)

    async def _watch(self, rank: int, shard: ShardHandle) -> None:
        try:
            await shard.watch()
            reason = "exited"
        except Exception as exc:  # whatever Ray raises for a dead or unschedulable actor
            reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        self._lose(ErrorInfo(ReplicaLostError.code, f"shard {rank}: {reason}"))

    def _on_shard_message(self, connection: Connection, message: Any) -> None:
        if connection in self._strangers:
            self._greet(connection, message)
        elif isinstance(message, ShardProgress):
            self._on_progress(message)
        elif isinstance(message, ShardReady):
            self._ready[message.rank] = message
            self._check_ready()
        elif isinstance(message, ShardFailed):
            self._failures.append(message.error)
            self._lose(message.error)
        elif not isinstance(message, ShardBeat):
            self._on_message(message)

    def _check_ready(self) -> None:
        future = self._is_ready
        is_complete = len(self._ready) == self._num_shards and not self.is_over
        if is_complete and future is not None and not future.done():
            future.set_result(None)
            self._check_silence()

    def _check_silence(self) -> None:
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        if now_s - self._checked_s > self._silence_s * OWN_PAUSE_SHARE:
            self._listens_since_s = now_s
        self._checked_s = now_s
        for connection, rank in self._connections.items():
            heard_s = max(connection.last_received_s, self._listens_since_s)
            if now_s - heard_s > self._silence_s:
                silent = f"shard {rank} was silent for {self._silence_s:g} s"
                self._lose(ErrorInfo(ReplicaLostError.code, silent))
                return
        if not self.is_over:
            loop.call_later(self._silence_s / NUM_SILENCE_CHECKS, self._check_silence)

    def _greet(self, connection: Connection, message: Any) -> None:
        self._strangers.discard(connection)
        if not isinstance(message, ShardHello) or not hmac.compare_digest(
            message.secret, self._secret
        ):
            connection.close()
            return
        self._connections[connection] = message.rank
        if message.rank == 0:
            self._root = connection
            self._group_address = message.group_address
        if len(self._connections) == self._num_shards and self._group_address is not None:
            for other in self._connections:
                other.send(Peers(self._group_address))

    def _on_connection_lost(self, connection: Connection) -> None:
        self._strangers.discard(connection)
        rank = self._connections.pop(connection, None)
        if rank is not None:
            self._lose(ErrorInfo(ReplicaLostError.code, f"shard {rank} is gone"))

    def _lose(self, error: ErrorInfo) -> None:
        if self.is_over:
            return
        self.is_over = True
        if self._is_ready is not None and not self._is_ready.done():
            asyncio.get_running_loop().call_later(ROOT_CAUSE_WAIT_S, self._give_up, error)
        else:
            self._on_lost(error)

    def _give_up(self, first: ErrorInfo) -> None:
        """Fail the start with the root cause: a rank that lost its peers is never the cause."""
        causes = [failure for failure in self._failures if failure.code != "collective"]
        assert self._is_ready is not None
        if not self._is_ready.done():
            self._is_ready.set_exception(from_info((causes or self._failures or [first])[0]))


def _kill(pid: int | None) -> None:
    """End a process that hears nothing: Ray would ask it to leave, and keep its place meanwhile."""
    if pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
