"""One copy of a model: admits requests to its shards, and rebuilds the shards when one dies.

A plain class; `serve.app` makes a Ray Serve deployment of it. It never sees a token: rank 0 sends
them to the ingress itself. A request is one call of `generate`, open for the request's whole life,
so that Serve's counts, autoscaling and draining see it; the call yields two items, a `Verdict` and
a `Summary`, and raises nothing, since Serve would log a traceback a request.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from serve.errors import (
    CheckpointError,
    ErrorInfo,
    InternalError,
    NotReadyError,
    ReplicaLostError,
    ShoalError,
)
from serve.messages import (
    Add,
    Admitted,
    Drop,
    GenerateRequest,
    Load,
    LoadReport,
    Prediction,
    Refused,
    ReplicaStats,
    ShardProgress,
    Summary,
    Verdict,
)
from serve.replica.metrics import REPORT_S, ReplicaMetrics
from serve.replica.progress import ProgressFile
from serve.replica.supervision import Action, State, Supervision
from serve.shards.group import ShardGroup

logger = logging.getLogger("shoal.replica")

_encode = msgspec.msgpack.Encoder().encode
_decode_request = msgspec.msgpack.Decoder(GenerateRequest).decode

RETRY_AFTER_S = 1.0


class _Call:
    """One open request: its two answers, as they come."""

    __slots__ = ("summary", "verdict")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.verdict: asyncio.Future[ErrorInfo | None] = loop.create_future()
        self.summary: asyncio.Future[Summary] = loop.create_future()


class Replica:
    """Admission and supervision for one model copy.

    `make_group(on_message, on_progress, on_lost)` makes a new generation of shards (not started);
    `leave()` ends this process, after rebuilding failed twice. `prediction` is what the plan
    expects of this replica, for comparison; it may be set at any time.
    """

    def __init__(
        self,
        *,
        model: str,
        replica_id: str,
        make_group: Callable[..., ShardGroup],
        progress: ProgressFile,
        metrics: ReplicaMetrics,
        build_timeout_s: float,
        leave: Callable[[], None] = lambda: os._exit(1),
    ) -> None:
        self._model = model
        self._replica_id = replica_id
        self._make_group = make_group
        self._progress = progress
        self._metrics = metrics
        self._build_timeout_s = build_timeout_s
        self._leave = leave
        self._supervision = Supervision()
        self._group: ShardGroup | None = None
        self._calls: dict[int, _Call] = {}
        self._ready = asyncio.Event()
        self._rebuild: asyncio.Task[None] | None = None
        self._load = Load()
        self._lost_totals = Load()
        self._num_finished: dict[str, int] = {}
        self._telling: asyncio.Task[None] | None = None
        self.prediction: Prediction | None = None

    async def start(self) -> None:
        """Build the shards for the first time.

        Raises:
            ShoalError: the root cause; the deployment fails with it.
        """
        self._telling = asyncio.create_task(self._tell_metrics())
        try:
            await self._build()
        except ShoalError as exc:
            self._supervision.on_build_failed()
            self._progress.fail(str(exc))
            raise

    async def generate(self, payload: bytes) -> AsyncIterator[bytes]:
        """Serve one request, a msgpack `GenerateRequest`: yields a `Verdict`, then a `Summary`."""
        if self._supervision.state is not State.READY or self._group is None:
            error = NotReadyError(
                "the replica is rebuilding its shards", retry_after_s=RETRY_AFTER_S
            )
            yield _encode(Verdict(self._replica_id, error.info()))
            return
        request = _decode_request(payload)
        stream_id = request.stream.stream_id
        call = self._calls[stream_id] = _Call(asyncio.get_running_loop())
        try:
            self._group.send(Add(request))
            error_info = await call.verdict
            yield _encode(Verdict(self._replica_id, error_info))
            if error_info is None:
                yield _encode(await call.summary)
        finally:
            del self._calls[stream_id]
            if not call.summary.done() and self._group is not None:
                self._group.send(Drop(stream_id))

    async def wait_ready(self, replica_id: str) -> str:
        """Return this replica's id once its shards are ready (the router sends it here by id)."""
        if replica_id == self._replica_id:
            await self._ready.wait()
        return self._replica_id

    async def stats(self) -> bytes:
        """A msgpack `ReplicaStats`."""
        return _encode(self._stats())

    @property
    def is_failed(self) -> bool:
        """Whether rebuilding was given up."""
        return self._supervision.state is State.FAILED

    def stop(self) -> None:
        """End the shards; open requests are lost."""
        if self._telling is not None:
            self._telling.cancel()
        if self._rebuild is not None:
            self._rebuild.cancel()
        self._lose_calls()
        if self._group is not None:
            self._group.stop()
            self._group = None
        self._progress.remove()

    async def _build(self) -> None:
        """Make a group and wait for it; on failure the group is gone again.

        Raises:
            ShoalError: the root cause, whatever Ray or the system raised.
        """
        group = self._make_group(self._on_message, self._on_progress, self._on_lost)
        try:
            await group.start(timeout_s=self._build_timeout_s)
            if group.is_over:
                raise ReplicaLostError("a shard went away as soon as it was ready")
        except BaseException as exc:
            group.stop()
            if isinstance(exc, Exception) and not isinstance(exc, ShoalError):
                raise InternalError(f"{type(exc).__name__}: {exc}") from exc
            raise
        self._group = group
        self._supervision.on_ready()
        self._ready.set()
        self._progress.ready(kernels={shard.kernels for shard in group.ready.values()})
        root = group.ready[0]
        logger.info(
            "%s is ready: %d KV blocks; %s; %s",
            self._replica_id,
            root.num_total_blocks,
            ", ".join(f"{name} {seconds:.1f} s" for name, seconds in root.phases_s.items()),
            ", ".join(
                f"rank {rank} read {ready.num_read_bytes / 1e6:.1f} MB of the checkpoint"
                for rank, ready in sorted(group.ready.items())
            ),
        )

    def _on_message(self, message: Any) -> None:
        if isinstance(message, LoadReport):
            self._load = message.load
            return
        call = self._calls.get(message.stream_id)
        if isinstance(message, Summary):
            self._metrics.observe(message)
            for reason in message.finish_reasons:
                self._num_finished[reason] = self._num_finished.get(reason, 0) + 1
        if call is None:
            return
        if isinstance(message, Admitted) and not call.verdict.done():
            call.verdict.set_result(None)
        elif isinstance(message, Refused) and not call.verdict.done():
            call.verdict.set_result(message.error)
            call.summary.cancel()
        elif isinstance(message, Summary) and not call.summary.done():
            if not call.verdict.done():
                call.verdict.set_result(None)
            call.summary.set_result(message)

    def _on_progress(self, message: ShardProgress) -> None:
        self._progress.update(message)

    def _on_lost(self, error: ErrorInfo) -> None:
        """A ready group lost a shard: end every open call with that, rebuild in place."""
        if self._supervision.on_lost() is not Action.BUILD:
            return
        logger.error("%s lost its shards (%s); rebuilding", self._replica_id, error.message)
        self._ready.clear()
        self._lost_totals = _with_totals(self._load, self._lost_totals)
        self._load = Load()
        self._lose_calls()
        if self._group is not None:
            self._group.stop()
            self._group = None
        self._rebuild = asyncio.create_task(self._rebuild_until_ready())

    def _lose_calls(self) -> None:
        error = ErrorInfo(
            ReplicaLostError.code, "the replica lost a shard; try again", RETRY_AFTER_S
        )
        for stream_id, call in self._calls.items():
            if not call.verdict.done():
                call.verdict.set_result(error)
                call.summary.cancel()
            elif not call.summary.done():
                call.summary.set_result(Summary(stream_id, ["error"], 0, 0, error))

    def _stats(self) -> ReplicaStats:
        return ReplicaStats(
            model=self._model,
            replica_id=self._replica_id,
            is_ready=self._supervision.state is State.READY,
            load=_with_totals(self._load, self._lost_totals),
            num_rebuilds_total=self._supervision.num_rebuilds,
            requests_total=dict(self._num_finished),
            prediction=self.prediction,
        )

    async def _tell_metrics(self) -> None:
        while True:
            self._metrics.tell(self._stats())
            await asyncio.sleep(REPORT_S)

    async def _rebuild_until_ready(self) -> None:
        while True:
            try:
                await self._build()
            except ShoalError as exc:
                logger.error("%s could not be rebuilt: %s", self._replica_id, exc)
                is_hopeless = isinstance(exc, CheckpointError)
                if self._supervision.on_build_failed() is Action.EXIT or is_hopeless:
                    self._leave()
                    return
            else:
                logger.info("%s is rebuilt", self._replica_id)
                return


def _with_totals(load: Load, before: Load) -> Load:
    """`load` with the totals of earlier generations of shards added."""
    return msgspec.structs.replace(
        load,
        num_prompt_tokens_total=load.num_prompt_tokens_total + before.num_prompt_tokens_total,
        num_generation_tokens_total=load.num_generation_tokens_total
        + before.num_generation_tokens_total,
        num_preemptions_total=load.num_preemptions_total + before.num_preemptions_total,
        num_steps_total=load.num_steps_total + before.num_steps_total,
        num_evicted_blocks_total=load.num_evicted_blocks_total + before.num_evicted_blocks_total,
        num_cache_query_tokens_total=load.num_cache_query_tokens_total
        + before.num_cache_query_tokens_total,
        num_cache_hit_tokens_total=load.num_cache_hit_tokens_total
        + before.num_cache_hit_tokens_total,
    )
