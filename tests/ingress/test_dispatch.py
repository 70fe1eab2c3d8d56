"""The dispatcher over real token sockets; a stand-in of a Serve handle plays the replica."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from ray.exceptions import ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serve.errors import (
    ErrorInfo,
    InternalError,
    NotReadyError,
    OverloadedError,
    PoisonedRequestError,
    ReplicaLostError,
)
from serve.ingress.dispatch import ServeDispatcher
from serve.ingress.stream import TokenStream
from serve.messages import (
    FinishReason,
    GenerateRequest,
    Load,
    ReplicaStats,
    Summary,
    TokenDelta,
    Verdict,
)
from serve.routing.registry import ReplicaTable
from serve.shards.streams import TokenStreams
from serve.testing.drive import generate_request

_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.Decoder(GenerateRequest).decode

Calls = AsyncIterator[bytes]
ADMITTED = _encode(Verdict("r1"))
NOT_READY = _encode(Verdict("r1", ErrorInfo("not_ready", "rebuilding", 1.0)))


class _Handle:
    """A Serve handle of one replica: `script(request)` is its `generate`.

    `ready_answers` are what `wait_ready` answers or raises, in turn, then its own id for ever.
    """

    def __init__(self, script: Callable[[GenerateRequest], Calls]) -> None:
        self.script = script
        self.requests: list[GenerateRequest] = []
        self.num_ended = 0
        self.is_ready = asyncio.Event()
        self.is_ready.set()
        self.ready_answers: list[str | BaseException] = []
        self.stats_of: dict[str, ReplicaStats | BaseException | None] = {}

    def options(self, *, method_name: str, stream: bool) -> "_Handle":
        assert (method_name, stream) == ("generate", True)
        return self

    async def remote(self, payload: bytes) -> Calls:
        self.requests.append(_decode(payload))
        try:
            async for item in self.script(self.requests[-1]):
                yield item
        finally:
            self.num_ended += 1

    @property
    def wait_ready(self) -> "_WaitReady":
        return _WaitReady(self)

    @property
    def stats(self) -> "_Stats":
        return _Stats(self)


class _WaitReady:
    def __init__(self, handle: _Handle) -> None:
        self._handle = handle

    async def remote(self, *, replica_id: str) -> str:
        await self._handle.is_ready.wait()
        if not self._handle.ready_answers:
            return replica_id
        answer = self._handle.ready_answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


class _Stats:
    def __init__(self, handle: _Handle) -> None:
        self._handle = handle

    async def remote(self, *, replica_id: str) -> bytes:
        answer = self._handle.stats_of[replica_id]
        if isinstance(answer, BaseException):
            raise answer
        if answer is None:
            await asyncio.Event().wait()
        return _encode(answer)


class _World:
    """A dispatcher with one listed replica, `r1`, and that replica's rank 0."""

    def __init__(self, folder: Path, ready_timeout_s: float) -> None:
        self.table = ReplicaTable()
        self.table.set_replicas(frozenset({"r1"}))
        self.handle = _Handle(lambda _: _hang())
        self.dispatcher = ServeDispatcher(
            handles={"m": self.handle},  # type: ignore[dict-item]
            tables={"m": self.table},
            socket_dir=str(folder),
            host="127.0.0.1",
            ready_timeout_s=ready_timeout_s,
        )
        self.aborted: list[int] = []
        self.shard = TokenStreams(replica_id="r1", on_abort=self.aborted.append)
        self.may_end = asyncio.Event()

    async def admit(self, request: GenerateRequest) -> Calls:
        """A replica that admits, and ends once `may_end` is set."""
        self.shard.open(request.stream)
        yield ADMITTED
        await self.may_end.wait()
        yield _encode(Summary(request.stream.stream_id, ["stop"], 1, 1))

    def speak(self, request: GenerateRequest, start: int, *ids: int, end: bool = False) -> None:
        reason: FinishReason | None = "stop" if end else None
        delta = TokenDelta(request.stream.stream_id, 0, start, list(ids), None, reason)
        self.shard.deliver([delta], Load())

    async def stop(self) -> None:
        await _until(lambda: not self.shard._dialling)
        for link in list(self.shard._links.values()):
            assert link.connection is not None
            link.connection.close()
        self.dispatcher.stop()
        for _ in range(3):  # what was closed tells its transport soon
            await asyncio.sleep(0)

    def submit(self) -> "asyncio.Task[TokenStream]":
        return asyncio.create_task(self.dispatcher.submit(generate_request(0, [1])))


async def _hang() -> Calls:
    await asyncio.Event().wait()
    yield b""


async def _answer(*items: bytes | BaseException) -> Calls:
    for item in items:
        if isinstance(item, BaseException):
            raise item
        yield item


async def _until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def _read(stream: TokenStream) -> list[int]:
    ids: list[int] = []
    while deltas := await stream.next():
        ids += [token_id for delta in deltas for token_id in delta.token_ids]
    return ids


def _run(
    folder: Path, test: Callable[[_World], Awaitable[None]], *, ready_timeout_s: float = 60.0
) -> None:
    async def main() -> None:
        world = _World(folder, ready_timeout_s)
        await world.dispatcher.start()
        try:
            async with asyncio.timeout(60):
                await test(world)
        finally:
            await world.stop()

    asyncio.run(main())


def test_a_request_is_admitted_and_its_tokens_arrive_once(tmp_path: Path) -> None:
    async def test(world: _World) -> None:
        world.handle.script = world.admit
        stream = await world.submit()
        assert stream.replica_id == "r1"
        request = world.handle.requests[0]
        world.speak(request, 0, 7)
        world.speak(request, 1, 8, end=True)
        assert await _read(stream) == [7, 8]
        world.may_end.set()
        await _until(lambda: world.handle.num_ended == 1)
        assert world.aborted == []

    _run(tmp_path, test)


def test_tokens_that_overtake_the_verdict_are_kept(tmp_path: Path) -> None:
    async def test(world: _World) -> None:
        async def script(request: GenerateRequest) -> Calls:
            world.shard.open(request.stream)
            delta = TokenDelta(request.stream.stream_id, 0, 0, [7], None, "stop")
            world.shard.deliver([delta], Load(num_running=5))
            await _until(lambda: world.table.score("r1") == (5, 0))
            yield ADMITTED

        world.handle.script = script
        stream = await world.submit()
        assert await _read(stream) == [7]

    _run(tmp_path, test)


def test_every_attempt_has_a_stream_id_of_its_own(tmp_path: Path) -> None:
    async def test(world: _World) -> None:
        world.handle.script = world.admit
        await asyncio.gather(*(world.submit() for _ in range(10)))
        assert len({request.stream.stream_id for request in world.handle.requests}) == 10

    _run(tmp_path, test)


def test_a_refusal_of_the_engine_passes_as_it_is(tmp_path: Path) -> None:
    async def test(world: _World) -> None:
        refusal = Verdict("r1", ErrorInfo("overloaded", "the queue is full", 2.5))
        world.handle.script = lambda _: _answer(_encode(refusal))
        with pytest.raises(OverloadedError, match="the queue is full") as error:
            await world.submit()
        assert error.value.retry_after_s == 2.5
        assert len(world.handle.requests) == 1
        assert world.dispatcher.has_ready_replica("m")

    _run(tmp_path, test)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (BackPressureError(5, 5), OverloadedError),
        (DeploymentUnavailableError("m"), NotReadyError),  # type: ignore[arg-type]
        (ActorUnavailableError("gone", b"0" * 16), ReplicaLostError),
        (asyncio.CancelledError(), ReplicaLostError),
        (ValueError("a bug"), InternalError),
    ],
)
def test_a_call_that_fails_before_the_verdict_is_one_typed_error(
    tmp_path: Path, failure: BaseException, expected: type[Exception]
) -> None:
    async def test(world: _World) -> None:
        world.handle.script = lambda _: _answer(failure)
        with pytest.raises(expected):
            await world.submit()

    _run(tmp_path, test)


def test_a_call_that_ends_without_a_verdict_is_a_lost_replica(tmp_path: Path) -> None:
    async def test(world: _World) -> None:
        world.handle.script = lambda _: _answer()
        with pytest.raises(ReplicaLostError):
            await world.submit()

    _run(tmp_path, test)


def test_a_request_that_meets_a_rebuild_tries_again_once_the_replica_is_ready(
    tmp_path: Path,
) -> None:
    async def test(world: _World) -> None:
        world.handle.script = lambda _: _answer(NOT_READY)
        world.handle.is_ready.clear()
        submitted = world.submit()
        await _until(lambda: not world.dispatcher.has_ready_replica("m"))
        world.handle.script = world.admit
        world.handle.is_ready.set()
        stream = await submitted
        first, second = world.handle.requests
        assert first.stream.stream_id != second.stream.stream_id
        world.speak(second, 0, 7, end=True)
        assert await _read(stream) == [7]

    _run(tmp_path, test)


def test_a_replica_that_stays_not_ready_is_a_503_after_the_time_limit(tmp_path: Path) -> None:
    async def test(world: _World) -> None:
        world.handle.script = lambda _: _answer(NOT_READY)
        world.handle.is_ready.clear()
        with pytest.raises(NotReadyError, match=r"within 0\.3 s") as error:
            await world.submit()
        assert error.value.retry_after_s
        assert len(world.handle.requests) == 1

    _run(tmp_path, test, ready_timeout_s=0.3)


def test_a_verdict_that_never_comes_is_a_503_after_the_time_limit(tmp_path: Path) -> None:
    async def test(world: _World) -> None:
        with pytest.raises(NotReadyError):
            await world.submit()

    _run(tmp_path, test, ready_timeout_s=0.3)


@pytest.mark.parametrize(
    "answer", ["another", ActorUnavailableError("gone", b"0" * 16), asyncio.CancelledError()]
)
def test_a_replica_is_asked_again_until_it_says_itself_that_it_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str | BaseException
) -> None:
    monkeypatch.setattr("serve.ingress.dispatch.ASK_AGAIN_S", 0.0)

    async def test(world: _World) -> None:
        world.handle.ready_answers = [answer]
        world.dispatcher._suspect("r1")
        assert not world.dispatcher.has_ready_replica("m")
        await _until(lambda: world.dispatcher.has_ready_replica("m"))

    _run(tmp_path, test)


def test_a_client_that_leaves_before_the_verdict_is_aborted_after_it(tmp_path: Path) -> None:
    async def test(world: _World) -> None:
        may_admit = asyncio.Event()

        async def script(request: GenerateRequest) -> Calls:
            world.shard.open(request.stream)
            await may_admit.wait()
            async for item in world.admit(request):
                yield item

        world.handle.script = script
        submitted = world.submit()
        await _until(lambda: world.handle.requests)
        submitted.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submitted
        may_admit.set()
        await _until(lambda: world.aborted)
        assert world.aborted == [world.handle.requests[0].stream.stream_id]
        assert world.handle.num_ended == 0, "the call ends by its normal path"
        world.may_end.set()
        await _until(lambda: world.handle.num_ended == 1)

    _run(tmp_path, test)


def test_a_client_that_leaves_in_the_stream_aborts_it_and_the_call_ends_by_itself(
    tmp_path: Path,
) -> None:
    async def test(world: _World) -> None:
        world.handle.script = world.admit
        stream = await world.submit()
        stream.abort()
        await _until(lambda: world.aborted)
        assert world.aborted == [world.handle.requests[0].stream.stream_id]
        assert world.handle.num_ended == 0

    _run(tmp_path, test)


@pytest.mark.parametrize(
    "failure", [ActorUnavailableError("gone", b"0" * 16), asyncio.CancelledError()]
)
def test_a_replica_lost_in_the_stream_ends_it_after_what_has_arrived(
    tmp_path: Path, failure: BaseException
) -> None:
    async def test(world: _World) -> None:
        may_fail = asyncio.Event()

        async def script(request: GenerateRequest) -> Calls:
            world.shard.open(request.stream)
            yield ADMITTED
            await may_fail.wait()
            raise failure

        world.handle.script = script
        world.handle.is_ready.clear()
        stream = await world.submit()
        world.speak(world.handle.requests[0], 0, 7)
        assert [delta.token_ids for delta in await stream.next()] == [[7]]
        may_fail.set()
        with pytest.raises(ReplicaLostError):
            await stream.next()
        assert not world.dispatcher.has_ready_replica("m")

    _run(tmp_path, test)


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        (Summary(0, ["error"], 1, 1, ErrorInfo("replica_lost", "gone")), ReplicaLostError),
        (Summary(0, ["error"], 1, 1, ErrorInfo("poisoned_request", "NaN")), PoisonedRequestError),
        (Summary(0, ["abort"], 1, 1), ReplicaLostError),
    ],
)
def test_a_summary_that_is_no_normal_end_ends_the_stream_typed(
    tmp_path: Path, summary: Summary, expected: type[Exception]
) -> None:
    async def test(world: _World) -> None:
        world.handle.script = lambda _: _answer(ADMITTED, _encode(summary))
        stream = await world.submit()
        with pytest.raises(expected):
            await stream.next()

    _run(tmp_path, test)


@pytest.mark.parametrize("has_summary", [True, False])
def test_a_stream_whose_call_is_over_does_not_wait_for_ever_for_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_summary: bool
) -> None:
    monkeypatch.setattr("serve.ingress.dispatch.LAST_FRAME_S", 0.01)
    rest = [_encode(Summary(0, ["stop"], 1, 1))] if has_summary else []

    async def test(world: _World) -> None:
        world.handle.script = lambda _: _answer(ADMITTED, *rest)
        stream = await world.submit()
        with pytest.raises(ReplicaLostError):
            await stream.next()

    _run(tmp_path, test)


def test_open_requests_are_counted_until_their_calls_end(tmp_path: Path) -> None:
    async def test(world: _World) -> None:
        world.handle.script = world.admit
        await asyncio.gather(*(world.submit() for _ in range(3)))
        assert world.table.score("r1") == (3, 0)
        world.may_end.set()
        await _until(lambda: world.table.score("r1") == (0, 0))

    _run(tmp_path, test)


def test_the_loss_of_a_connection_skips_the_replica_until_it_is_ready_again(
    tmp_path: Path,
) -> None:
    async def test(world: _World) -> None:
        world.handle.script = world.admit
        world.handle.is_ready.clear()
        stream = await world.submit()
        world.speak(world.handle.requests[0], 0, 7)
        await stream.next()
        world.shard.lose_all(ErrorInfo("replica_lost", "gone", 1.0))
        with pytest.raises(ReplicaLostError):
            await stream.next()
        assert not world.dispatcher.has_ready_replica("m")
        world.handle.is_ready.set()
        await _until(lambda: world.dispatcher.has_ready_replica("m"))

    _run(tmp_path, test)


def test_stats_leave_out_replicas_that_fail_are_too_slow_or_not_the_one_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.ingress.dispatch.STATS_TIMEOUT_S", 0.5)

    async def test(world: _World) -> None:
        world.table.set_replicas(frozenset())
        assert await world.dispatcher.stats() == []
        good = ReplicaStats(model="m", replica_id="good", is_ready=True, load=Load())
        world.handle.stats_of = {
            "good": good,
            "dead": ActorUnavailableError("gone", b"0" * 16),
            "cancelled": asyncio.CancelledError(),
            "slow": None,
            "left": good,
        }
        world.table.set_replicas(frozenset(world.handle.stats_of))
        assert await world.dispatcher.stats() == [good]

    _run(tmp_path, test)
