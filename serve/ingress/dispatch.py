"""From a valid request to an admitted token stream: one Ray Serve call a request.

The call is made in a fresh context and its task is nobody's child, so that Serve never cancels it
when a client goes: only our abort frame ends a request, and the call returns by its normal path.
A request that finds its replica rebuilding tries again, until `ready_timeout_s`.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar, cast

import msgspec
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve.errors import (
    InternalError,
    NotReadyError,
    OverloadedError,
    ReplicaLostError,
    ShoalError,
    from_info,
)
from serve.ingress.sockets import TokenSockets
from serve.ingress.stream import TokenStream
from serve.messages import GenerateRequest, Load, ReplicaStats, Summary, Verdict
from serve.routing.registry import ReplicaTable

logger = logging.getLogger("shoal.ingress")

Result = TypeVar("Result")

READY_TIMEOUT_S = 10.0
STATS_TIMEOUT_S = 2.0
RETRY_AFTER_S = 1.0
ASK_AGAIN_S = 0.1
LAST_FRAME_S = 5.0

_encode = msgspec.msgpack.Encoder().encode
_decode_verdict = msgspec.msgpack.Decoder(Verdict).decode
_decode_summary = msgspec.msgpack.Decoder(Summary).decode
_decode_stats = msgspec.msgpack.Decoder(ReplicaStats).decode


class ServeDispatcher:
    """`Dispatcher` over Ray Serve handles and this process' token sockets.

    `handles` and `tables` are keyed by model name; `ready_timeout_s` is how long a request may wait
    to be admitted.
    """

    def __init__(
        self,
        *,
        handles: Mapping[str, DeploymentHandle[Any]],
        tables: Mapping[str, ReplicaTable],
        socket_dir: str,
        host: str,
        ready_timeout_s: float = READY_TIMEOUT_S,
    ) -> None:
        self._ready_timeout_s = ready_timeout_s
        self._generate = {
            model: handle.options(method_name="generate", stream=True)
            for model, handle in handles.items()
        }
        self._handles = handles
        self._tables = tables
        self._sockets = TokenSockets(
            socket_dir=socket_dir, host=host, on_load=self._on_load, on_lost=self._on_lost
        )
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Open the token sockets."""
        await self._sockets.start()

    def stop(self) -> None:
        """Close the token sockets."""
        self._sockets.stop()

    async def submit(self, request: GenerateRequest) -> TokenStream:
        """See `Dispatcher.submit`."""
        table = self._tables[request.model]
        try:
            async with asyncio.timeout(self._ready_timeout_s):
                while True:
                    await table.wait_ready()
                    attempt = _Attempt(request, self._sockets)
                    self._spawn(self._call(attempt, table))
                    try:
                        stream = await attempt.admitted()
                    except _TryAgainError:
                        continue
                    return stream
        except TimeoutError:
            raise NotReadyError(
                f"no replica of {request.model} was ready within {self._ready_timeout_s:g} s",
                retry_after_s=RETRY_AFTER_S,
            ) from None

    def has_ready_replica(self, model: str) -> bool:
        """See `Dispatcher.has_ready_replica`."""
        return bool(self._tables[model].ready_ids)

    async def stats(self) -> list[ReplicaStats]:
        """See `Dispatcher.stats`."""
        asked = [
            self._spawn(self._ask_stats(model, replica_id))
            for model, table in self._tables.items()
            for replica_id in table.replica_ids
        ]
        if asked:
            await asyncio.wait(asked, timeout=STATS_TIMEOUT_S)
        answers = [task.result() for task in asked if task.done()]
        return [answer for answer in answers if answer is not None]

    async def _ask_stats(self, model: str, replica_id: str) -> ReplicaStats | None:
        try:
            answer = await self._handles[model].stats.remote(replica_id=replica_id)
        except asyncio.CancelledError:
            if _is_ours():
                raise
            return None
        except Exception as exc:  # the replica is going: its figures go with it
            logger.info("replica %s gave no stats: %s", replica_id, exc)
            return None
        stats = _decode_stats(answer)
        return stats if stats.replica_id == replica_id else None

    def _spawn(self, coroutine: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        context = contextvars.Context()
        task = asyncio.get_running_loop().create_task(coroutine, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _call(self, attempt: _Attempt, table: ReplicaTable) -> None:
        """Hold the Serve call of one attempt open until the replica ends it."""
        handle = self._generate[attempt.request.model]
        replica_id = ""
        try:
            items = cast(AsyncIterator[bytes], handle.remote(_encode(attempt.request)))
            async for item in items:
                if not replica_id:
                    verdict = _decode_verdict(item)
                    replica_id = verdict.replica_id
                    table.book(replica_id, +1)
                    self._judge(attempt, verdict, table)
                else:
                    attempt.finish(_decode_summary(item))
            attempt.expire()
        except BackPressureError as exc:
            attempt.refuse(OverloadedError(str(exc), retry_after_s=RETRY_AFTER_S))
        except DeploymentUnavailableError as exc:
            attempt.refuse(NotReadyError(str(exc), retry_after_s=RETRY_AFTER_S))
        except (RayActorError, asyncio.CancelledError) as exc:
            if isinstance(exc, asyncio.CancelledError) and _is_ours():
                raise
            if replica_id:
                self._suspect(replica_id)
            attempt.refuse(_lost())
        except Exception as exc:  # the call's last resort: this request ends typed, others go on
            logger.exception("a request's call failed")
            attempt.refuse(InternalError(f"the replica failed: {type(exc).__name__}"))
        finally:
            if replica_id:
                table.book(replica_id, -1)

    def _judge(self, attempt: _Attempt, verdict: Verdict, table: ReplicaTable) -> None:
        error = verdict.error
        if error is None:
            attempt.admit(verdict.replica_id)
        elif error.code in (NotReadyError.code, ReplicaLostError.code):
            self._suspect(verdict.replica_id)
            attempt.refuse(_TryAgainError())
        else:
            attempt.refuse(from_info(error))

    def _on_load(self, replica_id: str, load: Load) -> None:
        for table in self._tables.values():
            if replica_id in table.replica_ids:
                table.set_load(replica_id, load)

    def _on_lost(self, replica_id: str) -> None:
        self._suspect(replica_id)

    def _suspect(self, replica_id: str) -> None:
        """Skip a replica until it says itself that it is ready again."""
        for model, table in self._tables.items():
            if replica_id in table.replica_ids and table.mark_not_ready(replica_id):
                self._spawn(self._wait_ready(self._handles[model], table, replica_id))

    async def _wait_ready(
        self, handle: DeploymentHandle[Any], table: ReplicaTable, replica_id: str
    ) -> None:
        while replica_id in table.replica_ids:
            try:
                answered = await handle.wait_ready.remote(replica_id=replica_id)
            except asyncio.CancelledError:
                if _is_ours():
                    raise
            except Exception as exc:  # the replica is going: soon Serve takes it off the list
                logger.info("replica %s does not say whether it is ready: %s", replica_id, exc)
            else:
                if answered == replica_id:
                    table.mark_ready(replica_id)
                    return
            await asyncio.sleep(ASK_AGAIN_S)


class _TryAgainError(ShoalError):
    """The attempt met a replica that rebuilds: another attempt may follow."""

    def __init__(self) -> None:
        super().__init__("try again")


class _Attempt:
    """One attempt of one request: its stream id, its stream, whether it was admitted."""

    def __init__(self, request: GenerateRequest, sockets: TokenSockets) -> None:
        address = sockets.new_address()
        self.request = msgspec.structs.replace(request, stream=address)
        self._sockets = sockets
        self._stream_id = address.stream_id
        self._stream = TokenStream(
            num_choices=len(request.prompts) * request.n,
            replica_id="",
            on_abort=self._abort,
        )
        sockets.expect(self._stream_id, self._stream)
        self._admitted: asyncio.Future[TokenStream] = asyncio.get_running_loop().create_future()

    async def admitted(self) -> TokenStream:
        """The stream, once an engine took the request; a caller that is cancelled aborts it."""
        try:
            return await self._admitted
        except asyncio.CancelledError:
            self._abort()
            raise

    def admit(self, replica_id: str) -> None:
        self._stream.replica_id = replica_id
        if self._admitted.done():
            self._abort_at(replica_id)
        else:
            self._admitted.set_result(self._stream)

    def refuse(self, error: ShoalError) -> None:
        """The attempt is over, before or after admission."""
        if not self._admitted.done():
            self._admitted.set_exception(error)
        self._sockets.fail(self._stream_id, error)

    def finish(self, summary: Summary) -> None:
        """The replica's own end of the request. Tokens come by socket; a loss is news."""
        if summary.error is not None:
            self._sockets.fail(self._stream_id, from_info(summary.error))
        elif "abort" in summary.finish_reasons:
            self._sockets.fail(self._stream_id, _lost())

    def expire(self) -> None:
        """The call is over: what its tokens do not end within `LAST_FRAME_S`, this does."""
        if not self._admitted.done():
            self._admitted.set_exception(_lost())
        loop = asyncio.get_running_loop()
        loop.call_later(LAST_FRAME_S, self._sockets.fail, self._stream_id, _lost())

    def _abort(self) -> None:
        self._abort_at(self._stream.replica_id)

    def _abort_at(self, replica_id: str) -> None:
        self._sockets.abort(self._stream_id, replica_id)


def _lost() -> ReplicaLostError:
    return ReplicaLostError("the replica is gone; try again", retry_after_s=RETRY_AFTER_S)


def _is_ours() -> bool:
    """Whether a CancelledError was meant for the running task, not sent by the replica's side."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
