"""One shard: a plain class that `group.py` turns into a Ray actor.

Rank 0 runs the engine and the token streams; the others follow its steps. Start-up in order::

    dial the replica -> hello -> import the runner -> peers connect -> weights -> warm-up -> ready

This module imports no torch: the runner comes with the constructor, so that the replica's process,
which imports this file to make actors of it, stays small. A shard that cannot go on says why on
its control socket, once, and exits; nobody restarts it but its replica.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from serve.errors import ErrorInfo, InternalError, ReplicaLostError, ShoalError
from serve.logs import configure_logs
from serve.messages import (
    Add,
    Drop,
    Peers,
    ShardBeat,
    ShardFailed,
    ShardHello,
    ShardProgress,
    ShardReady,
    Shutdown,
)
from serve.shards.control import ControlLink
from serve.shards.inbox import Inbox
from serve.shards.spec import ShardSpec
from serve.shards.streams import HEARTBEAT_S, TokenStreams

if TYPE_CHECKING:
    from serve.shards.loading import LoadedShard

logger = logging.getLogger("shoal.shard")

PEERS_TIMEOUT_S = 60.0


class Shard:
    """One tensor-parallel rank in its own process.

    The constructor returns at once; progress, readiness and failure go over the control socket.
    """

    def __init__(self, spec: ShardSpec) -> None:
        configure_logs(spec.log_level)
        self._spec = spec
        self._inbox: Inbox[Add | Drop] = Inbox()
        self._peers: str | None = None
        self._has_peers = threading.Event()
        self._ended = threading.Event()
        self._streams = TokenStreams(
            replica_id=spec.replica_id,
            on_abort=lambda stream_id: self._inbox.put(Drop(stream_id)),
        )
        self._control = ControlLink(
            spec.control_address, self._on_message, self._on_replica_lost, self._on_broken
        )
        threading.Thread(target=self._run, name=f"rank{spec.rank}", daemon=True).start()

    def watch(self) -> None:
        """Sentinel: returns only when the shard has ended, so that its death is seen at once."""
        self._ended.wait()

    # The main thread of the shard.

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as exc:  # the engine loop's last resort: one root cause, said once
            self._fail(exc)
        self._exit(0)

    def _serve(self) -> None:
        spec = self._spec
        # "import" is the longest fixed part: let the replica know before, and import meanwhile.
        from serve.shards.loading import LoadedShard, group_listener

        began_s = time.monotonic()
        listener, group_address = (None, "")
        if spec.rank == 0 and spec.size > 1:
            listener, group_address = group_listener(spec.socket_dir)
        self._control.start(ShardHello(spec.secret, spec.rank, os.getpid(), group_address))
        if not self._has_peers.wait(PEERS_TIMEOUT_S):
            raise ReplicaLostError(f"the other shards did not start within {PEERS_TIMEOUT_S:g} s")
        shard = LoadedShard.load(
            spec,
            listener=listener,
            group_address=self._peers or "",
            on_progress=self._report_progress,
            began_s=began_s,
        )
        self._report_progress("warm_up", 0, 0)
        if spec.rank == 0:
            shard.warm_up()
            self._run_engine(shard)
        else:
            self._say_ready(shard)
            shard.follow()

    def _run_engine(self, shard: LoadedShard) -> None:
        from serve.shards.engine_loop import EngineLoop

        loop = EngineLoop(
            engine=shard.make_engine(),
            inbox=self._inbox,
            streams=self._streams,
            control=self._control,
        )
        self._say_ready(shard)
        loop.run()

    def _say_ready(self, shard: LoadedShard) -> None:
        self._control.send(
            ShardReady(
                self._spec.rank,
                shard.num_weight_bytes,
                shard.num_read_bytes,
                shard.num_total_blocks,
                shard.phases_s,
                shard.kernels,
            )
        )
        self._control.call(self._beat)

    def _report_progress(self, phase: Any, num_bytes: int, num_total_bytes: int) -> None:
        self._control.send(ShardProgress(self._spec.rank, phase, num_bytes, num_total_bytes))

    def _fail(self, exc: BaseException) -> None:
        error = (
            exc if isinstance(exc, ShoalError) else InternalError(f"{type(exc).__name__}: {exc}")
        )
        logger.error("rank %d failed: %s", self._spec.rank, error, exc_info=exc)
        lost = ErrorInfo(ReplicaLostError.code, "the model stopped while answering; try again", 1.0)
        self._control.call(self._streams.lose_all, lost)
        self._control.send(ShardFailed(self._spec.rank, error.info()))

    def _exit(self, status: int) -> None:
        self._control.flush()
        self._ended.set()
        os._exit(status)

    # On the I/O loop.

    def _on_message(self, message: Any) -> None:
        if isinstance(message, Add):
            self._streams.open(message.request.stream)
            self._inbox.put(message)
        elif isinstance(message, Drop):
            self._inbox.put(message)
        elif isinstance(message, Peers):
            self._peers = message.group_address
            self._has_peers.set()
        elif isinstance(message, Shutdown):
            os._exit(0)

    def _on_replica_lost(self) -> None:
        lost = ErrorInfo(ReplicaLostError.code, "the replica is gone; try again", 1.0)
        self._streams.lose_all(lost)
        self._control.loop.call_soon(os._exit, 0)

    def _on_broken(self, exc: BaseException) -> None:
        self._fail(exc)
        self._control.loop.call_soon(os._exit, 1)

    def _beat(self) -> None:
        self._streams.beat()
        self._control.send_now(ShardBeat())
        self._control.loop.call_later(HEARTBEAT_S, self._beat)
