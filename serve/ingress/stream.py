"""One request's tokens between the socket that receives them and the response that writes them.

Not a queue with back-pressure: the engine never waits for a reader, so what arrives is kept until
the response takes it (bounded by `max_tokens`). One waiter, no asyncio.Queue: a token costs one
append and, where the response waits, one future.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from serve.errors import ShoalError
from serve.messages import GenerateRequest, ReplicaStats, TokenDelta


class TokenStream:
    """Deltas of one admitted request, `num_choices` choices in any interleaving.

    Fed and read on one event loop. Over when every choice had its delta with a finish reason, or
    at the first error.
    """

    __slots__ = (
        "_deltas",
        "_error",
        "_num_unfinished",
        "_on_abort",
        "_waiter",
        "num_choices",
        "replica_id",
    )

    def __init__(
        self, *, num_choices: int, replica_id: str, on_abort: Callable[[], None] | None = None
    ) -> None:
        self.num_choices = num_choices
        self.replica_id = replica_id
        self._num_unfinished = num_choices
        self._on_abort = on_abort
        self._deltas: list[TokenDelta] = []
        self._error: ShoalError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more can arrive (what has arrived may still be unread)."""
        return self._error is not None or self._num_unfinished == 0

    def feed(self, delta: TokenDelta) -> None:
        """Take one delta off the socket."""
        if self.is_over:
            return
        self._deltas.append(delta)
        if delta.finish_reason is not None:
            self._num_unfinished -= 1
        self._wake()

    def fail(self, error: ShoalError) -> None:
        """End the stream with `error`, after what has arrived. A stream that is over stays so."""
        if not self.is_over:
            self._error = error
            self._wake()

    async def next(self) -> list[TokenDelta]:
        """Every delta that has arrived, at least one; an empty list once, at the end.

        Raises:
            ShoalError: what ended the stream before its choices finished.
        """
        while not self._deltas:
            if self._error is not None:
                raise self._error
            if self._num_unfinished == 0:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        deltas, self._deltas = self._deltas, []
        return deltas

    def abort(self) -> None:
        """Nobody reads any more: tell the engine to free the request. Safe to call at any time."""
        on_abort, self._on_abort = self._on_abort, None
        if on_abort is not None and not self.is_over:
            on_abort()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class Dispatcher(Protocol):
    """What the API layer needs of everything behind it."""

    async def submit(self, request: GenerateRequest) -> TokenStream:
        """Hand a request to a replica; returns once an engine has admitted it.

        Cancelled when the client leaves before that: the request must then end by itself.

        Raises:
            OverloadedError: the engine's waiting queue is full.
            NotReadyError: no replica became ready in time.
            ReplicaLostError: the replica went away before it answered.
        """
        ...

    def has_ready_replica(self, model: str) -> bool:
        """Whether `model` can be served now."""
        ...

    async def stats(self) -> list[ReplicaStats]:
        """What every replica reports now (those that do not answer in time are left out)."""
        ...
