"""A generating operation as a raw ASGI callable: body, admission, then tokens to the socket.

Not FastAPI: its request and response objects would cost more than the token does. The one
decision behind it: the answer is its own task, and the connection's end is awaited beside it, so
that a client that goes away at any moment (while its body is encoded, while it waits for admission,
in the middle of a stream) cancels exactly that task, whose way out aborts the request.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor

from msgspec import structs
from starlette.types import Receive, Scope, Send

from serve.errors import InternalError, ReplicaLostError, ShoalError

from .answer import Answer, FinishedParts
from .auth import KEY_NAME_STATE
from .body import BODY_TIMEOUT_S, ClientGoneError, parse_object, read_body
from .operations import Prepare, Prepared
from .responses import Header, request_id_of, send_error, send_json
from .served_model import ServedModels
from .stream import Dispatcher, TokenStream
from .wire import error_event

INLINE_BODY_BYTES = 2048
STALLED_CLIENT_S = 30.0

_STREAM_HEADERS: tuple[Header, ...] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)

_log = logging.getLogger("shoal.ingress")


class GenerateEndpoint:
    """`POST` of one operation; `executor` encodes bodies longer than `INLINE_BODY_BYTES`."""

    def __init__(
        self,
        prepare: Prepare,
        *,
        models: ServedModels,
        dispatcher: Dispatcher,
        executor: Executor,
        max_body_bytes: int,
        body_timeout_s: float = BODY_TIMEOUT_S,
        stalled_client_s: float = STALLED_CLIENT_S,
    ) -> None:
        self._prepare = prepare
        self._models = models
        self._dispatcher = dispatcher
        self._executor = executor
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._stalled_client_s = stalled_client_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or abort it when the client goes away."""
        headers = [(b"x-request-id", request_id_of(scope))]
        try:
            body = await read_body(
                scope, receive, max_bytes=self._max_body_bytes, timeout_s=self._body_timeout_s
            )
        except ClientGoneError:
            return
        except ShoalError as error:
            await send_error(send, error, headers)
            return
        response = _Response(send, headers)
        answer = asyncio.ensure_future(self._answer(body, _namespace_of(scope), response))
        gone = asyncio.ensure_future(_client_gone(receive))
        stall = _StallTimer(response, answer, limit_s=self._stalled_client_s)
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stall.stop()
            answer.cancel()
            gone.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)

    async def _answer(self, body: bytes, namespace: bytes, response: _Response) -> None:
        try:
            prepared = await self._prepared(body)
            request = structs.replace(prepared.request, namespace=namespace)
            stream = await self._dispatcher.submit(request)
            try:
                if prepared.is_stream:
                    await _write_stream(stream, prepared.answer, response)
                else:
                    await _write_whole(stream, prepared.answer, response)
            finally:
                stream.abort()
        except ShoalError as error:
            await response.fail(error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            await response.fail(ReplicaLostError("the replica cancelled the request"))
        except Exception:
            _log.exception("a request failed")
            await response.fail(InternalError("internal error"))

    async def _prepared(self, body: bytes) -> Prepared:
        if len(body) <= INLINE_BODY_BYTES:
            return self._prepare(parse_object(body), self._models)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._executor, lambda: self._prepare(parse_object(body), self._models)
        )


def _namespace_of(scope: Scope) -> bytes:
    """What keeps the prefix cache of one API key from the others'; empty without keys."""
    name: str = scope.get("state", {}).get(KEY_NAME_STATE, "")
    return name.encode()


async def _write_stream(stream: TokenStream, answer: Answer, response: _Response) -> None:
    await response.start_stream()
    while not answer.is_finished:
        deltas = await stream.next()
        if not deltas:
            raise InternalError("the stream ended before its choices did")
        events: list[bytes] = []
        try:
            answer.stream(deltas, events)
        finally:
            if events:
                await response.send_events(b"".join(events), is_last=answer.is_finished)


async def _write_whole(stream: TokenStream, answer: Answer, response: _Response) -> None:
    parts: dict[int, FinishedParts] = {}
    while not answer.is_finished:
        deltas = await stream.next()
        if not deltas:
            raise InternalError("the stream ended before its choices did")
        answer.collect(deltas, parts)
    await response.send_whole(answer.body(parts))


class _Response:
    """What has been sent of one response; `sending_since_s` while a send waits for the client."""

    def __init__(self, send: Send, headers: list[Header]) -> None:
        self.sending_since_s: float | None = None
        self._send = send
        self._headers = headers
        self._time = asyncio.get_running_loop().time
        self._is_streaming = False
        self._is_over = False

    async def start_stream(self) -> None:
        headers = [*_STREAM_HEADERS, *self._headers]
        self._is_streaming = True
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def send_events(self, events: bytes, *, is_last: bool) -> None:
        self._is_over = is_last
        self.sending_since_s = self._time()
        await self._send({"type": "http.response.body", "body": events, "more_body": not is_last})
        self.sending_since_s = None

    async def send_whole(self, body: bytes) -> None:
        self._is_over = True
        await send_json(self._send, 200, body, self._headers)

    async def fail(self, error: ShoalError) -> None:
        """Say what went wrong, by the status if it is not sent yet, else by an event."""
        if self._is_over:
            return
        self._is_over = True
        if self._is_streaming:
            event = {"type": "http.response.body", "body": error_event(error)}
            await self._send(event)
        else:
            await send_error(self._send, error, self._headers)


class _StallTimer:
    """Cancels an answer whose client stopped reading: a full socket makes `send` wait.

    One timer a response, not one a send: a stall is found after one to two times `limit_s`.
    """

    def __init__(
        self, response: _Response, answer: asyncio.Future[None], *, limit_s: float
    ) -> None:
        self._response = response
        self._answer = answer
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._handle = self._loop.call_later(limit_s, self._check)

    def stop(self) -> None:
        self._handle.cancel()

    def _check(self) -> None:
        since_s = self._response.sending_since_s
        if since_s is not None and self._loop.time() - since_s >= self._limit_s:
            self._answer.cancel()
        else:
            self._handle = self._loop.call_later(self._limit_s, self._check)


async def _client_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
