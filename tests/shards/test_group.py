"""A group of shards in real processes, without Ray: start, serve, lose one, say why."""

import asyncio
import contextlib
import pickle
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from serve.config import EngineConfig, HardwareConfig, ModelConfig, StandInConfig
from serve.errors import ErrorInfo, ShoalError
from serve.ingress.sockets import TokenSockets
from serve.ingress.stream import TokenStream
from serve.messages import (
    Add,
    Admitted,
    GenerateRequest,
    LoadReport,
    Prompt,
    SamplingParams,
    ShardProgress,
    Summary,
)
from serve.shards.group import ShardGroup
from serve.shards.spec import SILENCE_S, ShardSpec
from serve.testing.checkpoints import add_demo_tokenizer, make_checkpoint

pytestmark = pytest.mark.timeout(300)

_MAIN = """
import pickle, sys
from serve.shards.actor import Shard
Shard(pickle.loads(bytes.fromhex(sys.argv[1]))).watch()
"""


class _Process:
    """A `ShardHandle` over a plain process."""

    def __init__(self, spec: ShardSpec) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, pickle.dumps(spec).hex()], stderr=subprocess.DEVNULL
        )

    async def watch(self) -> None:
        status = await asyncio.to_thread(self.process.wait)
        raise RuntimeError(f"exit status {status}")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()


class _World:
    """A group, the token sockets of one ingress, and what both have heard."""

    def __init__(self, folder: Path, model: ModelConfig, size: int, silence_s: float) -> None:
        self.messages: list[Any] = []
        self.progress: list[ShardProgress] = []
        self.lost: list[ErrorInfo] = []
        self.processes: list[_Process] = []
        self.sockets = TokenSockets(
            socket_dir=str(folder),
            host="127.0.0.1",
            on_load=lambda *_: None,
            on_lost=lambda _: None,
        )

        def specs(control_address: str, secret: bytes) -> list[ShardSpec]:
            hardware = HardwareConfig(threads_per_shard=1)
            return [
                ShardSpec(
                    model,
                    hardware,
                    rank,
                    size,
                    "r1",
                    control_address,
                    secret,
                    str(folder),
                    silence_s,
                )
                for rank in range(size)
            ]

        def start(spec: ShardSpec) -> _Process:
            self.processes.append(_Process(spec))
            return self.processes[-1]

        self.group = ShardGroup(
            specs=specs,
            start_shard=start,
            on_message=self.messages.append,
            on_progress=self.progress.append,
            on_lost=self.lost.append,
            socket_dir=str(folder),
            host="127.0.0.1",
        )

    def add(self, *, max_tokens: int) -> tuple[int, TokenStream]:
        address = self.sockets.new_address()
        stream = TokenStream(num_choices=1, replica_id="r1")
        self.sockets.expect(address.stream_id, stream)
        request = GenerateRequest(
            request_id="x",
            model="m",
            prompts=[Prompt([1, 2, 3])],
            sampling=SamplingParams(seed=7, max_tokens=max_tokens, temperature=0.0),
            stream=address,
        )
        self.group.send(Add(request))
        return address.stream_id, stream


def _checkpoint(folder: Path) -> Path:
    return add_demo_tokenizer(make_checkpoint(folder / "model", vocab_size=8192))


def _model(folder: Path, *, step_ms: float | None, path: Path | None = None) -> ModelConfig:
    if path is None:
        path = _checkpoint(folder)
    return ModelConfig(
        name="m",
        path=path,
        dtype="float32",
        max_model_len=512,
        engine=EngineConfig(kv_cache_tokens=1024),
        stand_in=None if step_ms is None else StandInConfig(step_ms=step_ms),
    )


def _run(
    folder: Path,
    model: ModelConfig,
    size: int,
    test: Callable[[_World], Awaitable[None]],
    *,
    silence_s: float = SILENCE_S,
) -> None:
    async def main() -> None:
        world = _World(folder, model, size, silence_s)
        await world.sockets.start()
        try:
            async with asyncio.timeout(250):
                await test(world)
        finally:
            world.group.stop()
            world.sockets.stop()
            for process in world.processes:
                process.process.wait(60)
            await asyncio.sleep(0)

    asyncio.run(main())


async def _read(stream: TokenStream) -> list[int]:
    ids: list[int] = []
    while deltas := await stream.next():
        ids += [token_id for delta in deltas for token_id in delta.token_ids]
    return ids


async def _until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_two_shards_of_a_real_model_answer_and_say_so_once(tmp_path: Path) -> None:
    async def test(world: _World) -> None:
        await world.group.start(timeout_s=200)
        stream_id, stream = world.add(max_tokens=12)
        assert len(await _read(stream)) == 12
        await _until(lambda: any(isinstance(m, Summary) for m in world.messages))
        admitted, summary = (m for m in world.messages if not isinstance(m, LoadReport))
        assert admitted == Admitted(stream_id)
        assert isinstance(summary, Summary)
        assert (summary.stream_id, summary.finish_reasons) == (stream_id, ["length"])
        assert (summary.num_prompt_tokens, summary.num_completion_tokens) == (3, 12)
        ready = world.group.ready
        total = ready[0].num_read_bytes + ready[1].num_read_bytes
        assert ready[0].num_read_bytes < 0.6 * total
        weights = [p for p in world.progress if p.phase == "weights" and p.rank == 0]
        assert weights[-1].num_bytes == weights[-1].num_total_bytes > 0

    _run(tmp_path, _model(tmp_path, step_ms=None), 2, test)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_loss_of_any_rank_ends_the_stream_and_the_group_once(tmp_path: Path, rank: int) -> None:
    async def test(world: _World) -> None:
        await world.group.start(timeout_s=200)
        _, stream = world.add(max_tokens=500)
        await stream.next()
        world.processes[rank].process.kill()
        await _until(lambda: world.lost)
        world.group.stop()
        with pytest.raises(ShoalError):
            await _read(stream)
        for process in world.processes:
            await asyncio.to_thread(process.process.wait, 60)
        assert len(world.lost) == 1

    _run(tmp_path, _model(tmp_path, step_ms=5), 2, test)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_shard_frozen_while_nobody_asks_is_lost_at_the_limit_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr(_Process, "kill", lambda _: None)  # Ray asks, which it does not hear

    async def test(world: _World) -> None:
        await world.group.start(timeout_s=200)
        world.processes[rank].process.send_signal(signal.SIGSTOP)
        await _until(lambda: world.lost)
        world.group.stop()
        ends = [await asyncio.to_thread(p.process.wait, 60) for p in world.processes]
        assert (ends[rank], ends[1 - rank]) == (-signal.SIGKILL, 0)
        assert [error.message for error in world.lost] == [f"shard {rank} was silent for 4 s"]

    _run(tmp_path, _model(tmp_path, step_ms=5), 2, test, silence_s=4.0)


def test_a_pause_of_the_replica_itself_is_no_silence_of_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused_s = 0.0  # so far, by the clock that goes on meanwhile

    async def test(world: _World) -> None:
        nonlocal paused_s
        loop = asyncio.get_running_loop()
        clock = loop.time
        monkeypatch.setattr(loop, "time", lambda: clock() + paused_s)
        await world.group.start(timeout_s=200)
        world.processes[1].process.send_signal(signal.SIGSTOP)
        paused_s = 20.0  # five times as long as a shard may be silent
        resumed_s = loop.time()
        await _until(lambda: loop.time() > resumed_s + 1.0)
        assert world.lost == []
        await _until(lambda: world.lost)
        assert loop.time() > resumed_s + 4.0

    _run(tmp_path, _model(tmp_path, step_ms=5), 2, test, silence_s=4.0)


def test_shards_whose_replica_is_gone_end_their_streams_and_leave(tmp_path: Path) -> None:
    async def test(world: _World) -> None:
        await world.group.start(timeout_s=200)
        _, stream = world.add(max_tokens=500)
        await stream.next()
        world.group.disconnect()
        with pytest.raises(ShoalError, match="gone"):
            await _read(stream)
        for process in world.processes:
            assert await asyncio.to_thread(process.process.wait, 60) == 0

    _run(tmp_path, _model(tmp_path, step_ms=5), 2, test)


def test_a_start_that_fails_gives_the_root_cause(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])

    async def test(world: _World) -> None:
        with pytest.raises(ShoalError, match=r"model\.safetensors"):
            await world.group.start(timeout_s=200)

    _run(tmp_path, _model(tmp_path, step_ms=None, path=path), 2, test)
