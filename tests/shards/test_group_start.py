"""How a group's start ends when its shards do not come, without processes."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.config import EngineConfig, HardwareConfig, ModelConfig
from serve.errors import NotReadyError, ShoalError
from serve.shards.group import ShardGroup, ShardHandle
from serve.shards.spec import ShardSpec


class _Shard:
    """An actor that says nothing; it ends when the test says so, or is killed."""

    def __init__(self) -> None:
        self.has_ended = asyncio.Event()
        self.is_killed = False

    async def watch(self) -> None:
        await self.has_ended.wait()
        raise RuntimeError("the actor cannot be placed")

    def kill(self) -> None:
        self.is_killed = True


def _group(folder: Path, start_shard: Callable[[ShardSpec], ShardHandle], size: int) -> ShardGroup:
    model = ModelConfig(name="m", path=folder, engine=EngineConfig())

    def specs(control_address: str, secret: bytes) -> list[ShardSpec]:
        hardware = HardwareConfig()
        return [
            ShardSpec(model, hardware, rank, size, "r1", control_address, secret, str(folder))
            for rank in range(size)
        ]

    return ShardGroup(
        specs=specs,
        start_shard=start_shard,
        on_message=lambda _: None,
        on_progress=lambda _: None,
        on_lost=lambda _: None,
        socket_dir=str(folder),
        host="127.0.0.1",
    )


def test_the_loop_runs_while_ray_takes_its_time_to_make_an_actor(tmp_path: Path) -> None:
    is_asked, may_answer = threading.Event(), threading.Event()
    was_answered = []

    async def main() -> None:
        shard = _Shard()

        def start(_: ShardSpec) -> _Shard:
            is_asked.set()
            was_answered.append(may_answer.wait(60))
            return shard

        group = _group(tmp_path, start, 1)
        starting = asyncio.create_task(group.start(timeout_s=0.01))
        while not is_asked.is_set():
            await asyncio.sleep(0)
        may_answer.set()
        with pytest.raises(NotReadyError):
            await starting
        group.stop()
        assert shard.is_killed

    asyncio.run(main())
    assert was_answered == [True]


def test_shards_that_do_not_come_are_named_and_nothing_stays(tmp_path: Path) -> None:
    async def main() -> None:
        shards: list[_Shard] = []

        def start(_: ShardSpec) -> _Shard:
            shards.append(_Shard())
            return shards[-1]

        group = _group(tmp_path, start, 2)
        with pytest.raises(NotReadyError, match=r"shards \[0, 1\] were not ready within 0\.01 s"):
            await group.start(timeout_s=0.01)
        group.stop()
        await asyncio.sleep(0)
        assert [shard.is_killed for shard in shards] == [True, True]

    asyncio.run(main())
    assert list(tmp_path.iterdir()) == []


def test_an_actor_that_ends_before_it_says_hello_ends_the_start_with_its_reason(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        shard = _Shard()
        shard.has_ended.set()
        group = _group(tmp_path, lambda _: shard, 1)
        with pytest.raises(ShoalError, match="shard 0: the actor cannot be placed"):
            await group.start(timeout_s=60)
        group.stop()

    asyncio.run(main())
