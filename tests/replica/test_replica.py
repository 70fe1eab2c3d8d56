"""A replica over groups that are no processes: admission, loss, rebuild, end."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import pytest

from serve.errors import (
    CheckpointError,
    ErrorInfo,
    InternalError,
    NotReadyError,
    OverloadedError,
    ShoalError,
)
from serve.messages import (
    Add,
    Admitted,
    Drop,
    Load,
    LoadReport,
    Refused,
    ReplicaStats,
    ShardReady,
    Summary,
    Verdict,
)
from serve.replica.metrics import ReplicaMetrics
from serve.replica.progress import ProgressFile
from serve.replica.replica import Replica
from serve.testing.drive import generate_request
from serve.testing.instruments import RecordingInstruments

_encode = msgspec.msgpack.encode
_decode_verdict = msgspec.msgpack.Decoder(Verdict).decode
_decode_summary = msgspec.msgpack.Decoder(Summary).decode

GONE = ErrorInfo("replica_lost", "shard 1 is gone", 1.0)


class _Group:
    """A generation of shards that obeys the test; `failure` is how its start ends."""

    def __init__(self, on_message: Any, on_lost: Any, failure: BaseException | None) -> None:
        self.hear = on_message
        self._on_lost = on_lost
        self._failure = failure
        self.sent: list[Any] = []
        self.is_over = False
        self.num_stops = 0
        self.may_start = asyncio.Event()
        self.ready = {0: ShardReady(0, 0, 0, 8, {})}

    async def start(self, *, timeout_s: float) -> None:
        await self.may_start.wait()
        if self._failure is not None:
            raise self._failure

    def send(self, message: Any) -> None:
        assert not self.is_over, "nothing is said to a group that is over"
        self.sent.append(message)

    def stop(self) -> None:
        self.is_over = True
        self.num_stops += 1

    def lose(self) -> None:
        self.is_over = True
        self._on_lost(GONE)


class _World:
    """A replica, the groups that it made so far, and how the next ones fail."""

    def __init__(self) -> None:
        self.groups: list[_Group] = []
        self.failures: dict[int, BaseException] = {}
        self.may_start = True
        self.has_left = asyncio.Event()
        self.instruments = RecordingInstruments()
        self.replica = Replica(
            model="m",
            replica_id="r1",
            make_group=self._make_group,
            progress=ProgressFile(None, ""),
            metrics=ReplicaMetrics(
                self.instruments, model="m", application="model-m", replica_id="r1"
            ),
            build_timeout_s=1.0,
            leave=self.has_left.set,
        )

    def _make_group(self, on_message: Any, on_progress: Any, on_lost: Any) -> Any:
        failure = self.failures.get(len(self.groups))
        group = _Group(on_message, on_lost, failure)
        if self.may_start:
            group.may_start.set()
        self.groups.append(group)
        return group

    @property
    def group(self) -> _Group:
        return self.groups[-1]

    async def stats(self) -> ReplicaStats:
        return msgspec.msgpack.decode(await self.replica.stats(), type=ReplicaStats)

    async def call(self, stream_id: int) -> AsyncIterator[bytes]:
        """A call whose request has reached the shards."""
        num_sent = len(self.group.sent)
        items = self.replica.generate(_encode(generate_request(stream_id, [1])))
        first = asyncio.ensure_future(anext(items))
        await _until(lambda: len(self.group.sent) > num_sent)

        async def rest() -> AsyncIterator[bytes]:
            try:
                yield await first
                async for item in items:
                    yield item
            finally:
                await items.aclose()  # type: ignore[attr-defined]

        return rest()

    async def rebuilt(self) -> None:
        await self.replica.wait_ready("r1")


async def _until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0)


def _run(test: Callable[[_World], Awaitable[None]], *, is_started: bool = True) -> None:
    async def main() -> None:
        world = _World()
        async with asyncio.timeout(60):
            if is_started:
                await world.replica.start()
            await test(world)
        world.replica.stop()

    asyncio.run(main())


def test_a_request_gets_its_verdict_at_admission_and_its_summary_at_its_end() -> None:
    async def test(world: _World) -> None:
        items = await world.call(5)
        assert world.group.sent == [Add(generate_request(5, [1]))]
        world.group.hear(Admitted(5))
        assert _decode_verdict(await anext(items)) == Verdict("r1")
        summary = Summary(5, ["stop"], 1, 3)
        world.group.hear(summary)
        assert _decode_summary(await anext(items)) == summary
        assert [item async for item in items] == []
        assert len(world.group.sent) == 1, "a request that is over is not dropped"

    _run(test)


def test_a_summary_that_comes_with_the_admission_still_comes_second() -> None:
    async def test(world: _World) -> None:
        items = await world.call(5)
        world.group.hear(Admitted(5))
        world.group.hear(Summary(5, ["abort"], 1, 0))
        verdict, summary = [item async for item in items]
        assert _decode_verdict(verdict).error is None
        assert _decode_summary(summary).finish_reasons == ["abort"]

    _run(test)


def test_a_refusal_is_the_only_item() -> None:
    async def test(world: _World) -> None:
        items = await world.call(5)
        error = OverloadedError("full", retry_after_s=2.0).info()
        world.group.hear(Refused(5, error))
        (only,) = [item async for item in items]
        assert _decode_verdict(only) == Verdict("r1", error)
        assert len(world.group.sent) == 1

    _run(test)


@pytest.mark.parametrize("is_admitted", [False, True])
def test_a_caller_that_goes_away_drops_its_request(is_admitted: bool) -> None:
    async def test(world: _World) -> None:
        items = world.replica.generate(_encode(generate_request(5, [1])))
        item = asyncio.ensure_future(anext(items))
        await _until(lambda: world.group.sent)
        if is_admitted:
            world.group.hear(Admitted(5))
            await item
            await items.aclose()  # type: ignore[attr-defined]
        else:
            item.cancel()
            with pytest.raises(asyncio.CancelledError):
                await item
        assert world.group.sent[1:] == [Drop(5)]
        world.group.hear(Summary(5, ["abort"], 1, 0))

    _run(test)


def test_lost_shards_end_each_open_call_once_by_how_far_it_was() -> None:
    async def test(world: _World) -> None:
        waiting, admitted = await world.call(1), await world.call(2)
        world.group.hear(Admitted(2))
        assert _decode_verdict(await anext(admitted)).error is None
        world.group.lose()
        (only,) = [item async for item in waiting]
        verdict = _decode_verdict(only)
        assert verdict.error is not None
        assert verdict.error.code == "replica_lost"
        (last,) = [item async for item in admitted]
        summary = _decode_summary(last)
        assert summary.error is not None
        assert summary.error.code == "replica_lost"

    _run(test)


def test_a_rebuild_takes_no_requests_and_then_new_ones_on_the_new_shards() -> None:
    async def test(world: _World) -> None:
        world.may_start = False
        old = world.group
        old.lose()
        await _until(lambda: len(world.groups) == 2)
        assert old.num_stops == 1
        (only,) = [i async for i in world.replica.generate(_encode(generate_request(1, [1])))]
        verdict = _decode_verdict(only)
        assert verdict.error is not None
        assert verdict.error.code == "not_ready"
        assert verdict.error.retry_after_s
        waiter = asyncio.create_task(world.replica.wait_ready("r1"))
        await asyncio.sleep(0)
        assert not waiter.done()
        assert not (await world.stats()).is_ready
        world.group.may_start.set()
        assert await waiter == "r1"
        await world.call(2)
        assert world.group is not old
        assert world.group.sent == [Add(generate_request(2, [1]))]
        assert world.group.num_stops == 0

    _run(test)


def test_the_question_for_another_replica_is_answered_at_once() -> None:
    async def test(world: _World) -> None:
        assert await world.replica.wait_ready("r2") == "r1"

    _run(test, is_started=False)


def test_a_second_sign_of_the_same_loss_changes_nothing() -> None:
    async def test(world: _World) -> None:
        world.group.lose()
        world.groups[0].lose()
        await world.rebuilt()
        assert len(world.groups) == 2
        assert (await world.stats()).num_rebuilds_total == 1

    _run(test)


def test_shards_lost_again_and_again_are_rebuilt_each_time() -> None:
    async def test(world: _World) -> None:
        for _ in range(5):
            world.group.lose()
            await world.rebuilt()
        assert len(world.groups) == 6
        assert not world.has_left.is_set()

    _run(test)


@pytest.mark.parametrize("failure", [NotReadyError("slow"), OSError("no more descriptors")])
def test_a_rebuild_that_fails_once_is_tried_again(failure: Exception) -> None:
    async def test(world: _World) -> None:
        world.failures = {1: failure}
        world.group.lose()
        await world.rebuilt()
        assert len(world.groups) == 3
        assert world.groups[1].num_stops == 1
        assert not world.has_left.is_set()

    _run(test)


@pytest.mark.parametrize("failure", [NotReadyError("slow"), ValueError("the name is taken")])
def test_a_rebuild_that_fails_twice_ends_the_process(failure: Exception) -> None:
    async def test(world: _World) -> None:
        world.failures = {1: failure, 2: failure}
        world.group.lose()
        await world.has_left.wait()
        assert len(world.groups) == 3
        assert world.replica.is_failed

    _run(test)


def test_a_checkpoint_that_became_unusable_ends_the_process_at_once() -> None:
    async def test(world: _World) -> None:
        world.failures = {1: CheckpointError("model.safetensors is truncated")}
        world.group.lose()
        await world.has_left.wait()
        assert len(world.groups) == 2

    _run(test)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [(CheckpointError("truncated"), CheckpointError), (OSError("no space"), InternalError)],
)
def test_a_first_start_that_fails_says_why_and_leaves_no_shard(
    failure: Exception, expected: type[ShoalError]
) -> None:
    async def test(world: _World) -> None:
        world.failures = {0: failure}
        with pytest.raises(expected, match=str(failure)):
            await world.replica.start()
        assert world.group.num_stops == 1

    _run(test, is_started=False)


def test_a_group_that_is_lost_the_moment_it_is_ready_is_no_start() -> None:
    async def test(world: _World) -> None:
        world.may_start = False
        starting = asyncio.create_task(world.replica.start())
        await _until(lambda: world.groups)
        world.group.lose()
        world.group.may_start.set()
        with pytest.raises(ShoalError):
            await starting
        assert len(world.groups) == 1

    _run(test, is_started=False)


def test_totals_survive_a_rebuild_and_the_load_does_not() -> None:
    async def test(world: _World) -> None:
        load = Load(
            num_running=3,
            num_generation_tokens_total=10,
            num_steps_total=4,
            num_cached_blocks=7,
            num_evicted_blocks_total=6,
            num_cache_query_tokens_total=9,
            num_cache_hit_tokens_total=8,
        )
        world.group.hear(LoadReport(load))
        world.group.hear(Summary(1, ["stop", "length"], 1, 10))
        world.group.lose()
        await world.rebuilt()
        world.group.hear(LoadReport(Load(num_running=1, num_generation_tokens_total=5)))
        stats = await world.stats()
        assert stats.load.num_running == 1
        assert stats.load.num_generation_tokens_total == 15
        assert stats.load.num_steps_total == 4
        assert stats.load.num_cached_blocks == 0
        assert stats.load.num_evicted_blocks_total == 6
        assert stats.load.num_cache_query_tokens_total == 9
        assert stats.load.num_cache_hit_tokens_total == 8
        assert stats.num_rebuilds_total == 1
        assert stats.requests_total == {"stop": 1, "length": 1}

    _run(test)


def test_a_starting_replica_tells_its_metrics_and_is_not_ready() -> None:
    async def test(world: _World) -> None:
        world.may_start = False
        starting = asyncio.create_task(world.replica.start())
        await _until(lambda: world.instruments.made["shoal_replica_ready"].values)
        assert world.instruments.value("shoal_replica_ready") == 0
        world.group.may_start.set()
        await starting

    _run(test, is_started=False)


def test_a_summary_is_counted_in_the_histograms_the_moment_it_comes() -> None:
    async def test(world: _World) -> None:
        world.group.hear(Summary(1, ["stop"], 1, 10, None, 2.0, 1.0))
        assert world.instruments.observed("vllm_e2e_request_latency_seconds") == [2.0]

    _run(test)


def test_a_replica_that_stops_ends_its_open_calls_and_takes_no_more() -> None:
    async def test(world: _World) -> None:
        items = await world.call(1)
        world.group.hear(Admitted(1))
        await anext(items)
        world.replica.stop()
        (last,) = [item async for item in items]
        summary = _decode_summary(last)
        assert summary.error is not None
        assert summary.error.code == "replica_lost"
        (only,) = [i async for i in world.replica.generate(_encode(generate_request(2, [1])))]
        verdict = _decode_verdict(only)
        assert verdict.error is not None
        assert verdict.error.code == "not_ready"

    _run(test)


def test_a_replica_that_stops_while_it_rebuilds_leaves_no_shard() -> None:
    async def test(world: _World) -> None:
        world.may_start = False
        world.group.lose()
        await _until(lambda: len(world.groups) == 2)
        world.replica.stop()
        await _until(lambda: world.group.num_stops)
        assert [group.is_over for group in world.groups] == [True, True]

    _run(test)
