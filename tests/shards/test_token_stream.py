"""Both ends of the token stream over real sockets: `TokenStreams` (rank 0), `TokenSockets`."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from serve.errors import ErrorInfo, ReplicaLostError
from serve.ingress.sockets import TokenSockets
from serve.ingress.stream import TokenStream
from serve.messages import Hello, Load, StreamAddress, TokenDelta, TokenFrame
from serve.shards.streams import TokenStreams
from serve.transport.connection import Connection, dial


class _Pair:
    """One ingress process and one rank 0, on one loop."""

    def __init__(self, folder: Path) -> None:
        self.loads: list[tuple[str, Load]] = []
        self.lost: list[str] = []
        self.aborted: list[int] = []
        self.sockets = TokenSockets(
            socket_dir=str(folder),
            host="127.0.0.1",
            on_load=lambda replica_id, load: self.loads.append((replica_id, load)),
            on_lost=self.lost.append,
        )
        self.streams = TokenStreams(replica_id="r1", on_abort=self.aborted.append)

    def open(self, num_choices: int = 1) -> tuple[StreamAddress, TokenStream]:
        address = self.sockets.new_address()
        stream = TokenStream(
            num_choices=num_choices,
            replica_id="r1",
            on_abort=lambda: self.sockets.abort(address.stream_id, "r1"),
        )
        self.sockets.expect(address.stream_id, stream)
        self.streams.open(address)
        return address, stream


def _run(tmp_path: Path, test: Callable[[_Pair], Awaitable[None]]) -> _Pair:
    async def main() -> _Pair:
        pair = _Pair(tmp_path)
        await pair.sockets.start()
        try:
            async with asyncio.timeout(60):
                await test(pair)
        finally:
            pair.sockets.stop()
            await asyncio.sleep(0)
        return pair

    return asyncio.run(main())


async def _until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def _delta(address: StreamAddress, start: int, *ids: int, end: bool = False) -> TokenDelta:
    return TokenDelta(address.stream_id, 0, start, list(ids), None, "stop" if end else None)


def test_tokens_sent_before_the_dial_is_done_arrive_in_order(tmp_path: Path) -> None:
    async def test(pair: _Pair) -> None:
        address, stream = pair.open()
        for start in range(5):
            pair.streams.deliver([_delta(address, start, start, end=start == 4)], Load())
        ids: list[int] = []
        while deltas := await stream.next():
            ids += [token_id for delta in deltas for token_id in delta.token_ids]
        assert ids == [0, 1, 2, 3, 4]

    _run(tmp_path, test)


def test_one_frame_a_step_feeds_every_stream_its_own_tokens(tmp_path: Path) -> None:
    async def test(pair: _Pair) -> None:
        opened = [pair.open() for _ in range(20)]
        pair.streams.deliver(
            [_delta(address, 0, i, end=True) for i, (address, _) in enumerate(opened)],
            Load(num_running=20),
        )
        for i, (_, stream) in enumerate(opened):
            assert [delta.token_ids for delta in await stream.next()] == [[i]]
        assert pair.loads == [("r1", Load(num_running=20))]
        assert pair.sockets.num_open == 0

    _run(tmp_path, test)


def test_a_frame_for_a_stream_that_nobody_knows_is_answered_with_an_abort(tmp_path: Path) -> None:
    async def test(pair: _Pair) -> None:
        address = pair.sockets.new_address()
        pair.streams.open(address)
        pair.streams.deliver([_delta(address, 0, 1)], Load())
        await _until(lambda: pair.aborted)
        assert pair.aborted == [address.stream_id]

    _run(tmp_path, test)


def test_an_abort_reaches_an_engine_that_has_not_called_home_yet(tmp_path: Path) -> None:
    async def test(pair: _Pair) -> None:
        address, stream = pair.open()
        stream.abort()
        await _until(lambda: pair.aborted)
        assert pair.aborted == [address.stream_id]

    _run(tmp_path, test)


def test_frames_of_another_connection_cannot_write_into_a_stream(tmp_path: Path) -> None:
    async def test(pair: _Pair) -> None:
        address, stream = pair.open()
        pair.streams.deliver([_delta(address, 0, 1)], Load())
        assert [delta.token_ids for delta in await stream.next()] == [[1]]
        woken = TokenStreams(replica_id="r1", on_abort=pair.aborted.append)
        woken.open(address)
        woken.deliver([_delta(address, 1, 666)], Load(num_running=99))
        await _until(lambda: pair.loads[-1][1].num_running == 99)
        pair.streams.deliver([_delta(address, 1, 2, end=True)], Load())
        assert [delta.token_ids for delta in await stream.next()] == [[2]]

    _run(tmp_path, test)


def test_a_caller_without_the_secret_is_sent_away(tmp_path: Path) -> None:
    async def test(pair: _Pair) -> None:
        address, stream = pair.open()
        gone: list[Connection] = []
        forged = await dial(
            address.address,
            lambda: Connection(msgspec.msgpack.Decoder(TokenFrame), lambda *_: None, gone.append),
        )
        forged.send(Hello(b"guess", "r1"))
        forged.send(TokenFrame(Load(), [_delta(address, 0, 666)]))
        await _until(lambda: gone)
        pair.streams.deliver([_delta(address, 0, 1, end=True)], Load())
        assert [delta.token_ids for delta in await stream.next()] == [[1]]

    _run(tmp_path, test)


def test_the_loss_of_a_replica_ends_its_streams_typed_and_at_once(tmp_path: Path) -> None:
    async def test(pair: _Pair) -> None:
        address, stream = pair.open()
        pair.streams.deliver([_delta(address, 0, 1)], Load())
        await stream.next()
        pair.streams.lose_all(ErrorInfo("replica_lost", "gone", 1.0))
        with pytest.raises(ReplicaLostError, match="gone"):
            await stream.next()
        assert pair.lost == ["r1"]

    _run(tmp_path, test)


def test_a_caller_that_never_says_hello_is_sent_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.ingress.sockets.SILENCE_S", 0.05)

    async def test(pair: _Pair) -> None:
        gone: list[Connection] = []
        await dial(
            pair.sockets.new_address().address,
            lambda: Connection(msgspec.msgpack.Decoder(TokenFrame), lambda *_: None, gone.append),
        )
        await _until(lambda: gone)

    _run(tmp_path, test)


def test_sockets_that_stop_end_streams_that_no_engine_has_spoken_in(tmp_path: Path) -> None:
    async def test(pair: _Pair) -> None:
        stream = TokenStream(num_choices=1, replica_id="r1")
        pair.sockets.expect(pair.sockets.new_address().stream_id, stream)
        pair.sockets.stop()
        with pytest.raises(ReplicaLostError):
            await stream.next()
        assert pair.sockets.num_open == 0

    _run(tmp_path, test)


def test_the_end_of_an_ingress_aborts_its_streams(tmp_path: Path) -> None:
    async def test(pair: _Pair) -> None:
        address, stream = pair.open()
        pair.streams.deliver([_delta(address, 0, 1)], Load())
        await stream.next()
        pair.sockets.stop()
        await _until(lambda: pair.aborted)
        assert pair.aborted == [address.stream_id]

    _run(tmp_path, test)


def test_a_silent_connection_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.ingress.sockets.SILENCE_S", 0.5)

    async def test(pair: _Pair) -> None:
        address, stream = pair.open()
        pair.streams.deliver([_delta(address, 0, 1)], Load())
        await stream.next()
        with pytest.raises(ReplicaLostError):
            await stream.next()

    _run(tmp_path, test)


def test_heartbeats_keep_an_idle_connection_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.ingress.sockets.SILENCE_S", 2.0)
    monkeypatch.setattr("serve.shards.streams.HEARTBEAT_S", 0.01)

    async def test(pair: _Pair) -> None:
        address, stream = pair.open()
        pair.streams.deliver([_delta(address, 0, 1)], Load())
        await stream.next()
        for _ in range(250):
            pair.streams.beat()
            await asyncio.sleep(0.01)
        pair.streams.deliver([_delta(address, 1, 2, end=True)], Load())
        assert [delta.token_ids for delta in await stream.next()] == [[2]]

    _run(tmp_path, test)


def test_a_reader_that_is_too_slow_is_dropped_and_its_streams_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.shards.streams.MAX_BACKLOG_BYTES", 100_000)

    async def test(pair: _Pair) -> None:
        address, stream = pair.open()
        pair.streams.deliver([_delta(address, 0, 1)], Load())
        await stream.next()
        many = list(range(70_000, 170_000))
        for _ in range(200):  # more than any socket buffer holds; the loop never runs meanwhile
            pair.streams.deliver([_delta(address, 1, *many)], Load())
        assert pair.aborted == [address.stream_id]

    _run(tmp_path, test)


def test_frames_for_an_ingress_that_cannot_be_dialled_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.shards.streams.MAX_BACKLOG_BYTES", 100_000)

    async def hang(*_: object) -> Connection:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr("serve.shards.streams.dial", hang)

    async def test(pair: _Pair) -> None:
        address, _ = pair.open()
        many = list(range(70_000, 80_000))
        for start in range(10):
            pair.streams.deliver([_delta(address, start, *many)], Load())
        assert pair.aborted == [address.stream_id]

    _run(tmp_path, test)
