"""A loaded shard: collectives, step channel, runner, and on rank 0 the engine over all of them.

The only file of the data plane's process tier that brings tensors in, and only inside a shard's
own process. torch comes with a GPU or the reference kernels alone.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from array import array
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.checkpoint import count_real_tokens, read_eos_token_ids
from serve.config import ModelConfig
from serve.engine.engine import Engine
from serve.engine.grammar import GrammarCompiler
from serve.engine.protocol import PendingOutput, Runner
from serve.engine.settings import EngineSettings
from serve.messages import Chunk, NewSequence, SamplingParams, StepInput, StepOutput
from serve.shards.spec import ShardSpec
from serve.testing.stand_in import StandInRunner
from serve.transport.address import Address, listen_blocking
from serve.transport.rendezvous import accept_ranks, dial_root
from serve.transport.step_channel import StepReceiver, StepSender

if TYPE_CHECKING:
    from serve.model.tensor_parallel import Collectives

Progress = Callable[[str, int, int], None]

PEER_TIMEOUT_S = 60.0
_LAST_WARM_UP_STEP_ID = 2


def group_listener(socket_dir: str) -> tuple[socket.socket, str]:
    """Where the other ranks dial rank 0: a Unix socket of a random name."""
    wanted = Address(path=os.path.join(socket_dir, f"g{secrets.token_hex(6)}"))
    listener, address = listen_blocking(wanted)
    return listener, str(address)


class _GroupRunner:
    """Rank 0's runner as the engine sees it: a step on every rank."""

    def __init__(self, runner: Runner, sender: StepSender) -> None:
        self._runner = runner
        self._sender = sender

    def start(self, step: StepInput) -> None:
        self._sender.send(step)
        self._runner.start(step)

    def sample(self, masks: Mapping[int, np.ndarray]) -> PendingOutput:
        return self._runner.sample(masks)


@dataclass(slots=True)
class LoadedShard:
    """One rank, ready for its first step; `phases_s` tells how long each phase of start-up took.

    Ranks load at speeds of their own, so they wait for each other as long as a start may take.
    From the end of the warm-up on they wait for `spec.silence_s`, and only within a step; an idle
    group may be silent for ever. `collectives` is None where no model is loaded.
    """

    spec: ShardSpec
    runner: Any
    collectives: Collectives | None
    channel: StepSender | StepReceiver
    num_total_blocks: int
    num_weight_bytes: int
    num_read_bytes: int
    max_model_len: int
    vocab_size: int
    kernels: str
    phases_s: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        spec: ShardSpec,
        *,
        listener: socket.socket | None,
        group_address: str,
        on_progress: Progress,
        began_s: float,
        opened: ExitStack | None = None,
    ) -> LoadedShard:
        """Connect to the other ranks and load this rank's slice.

        A caller whose process goes on after a failure closes `opened`, which leaves the group.

        Raises:
            ShoalError: a peer is missing, or the checkpoint cannot be used.
        """
        opened = ExitStack() if opened is None else opened
        phases_s = {"import": time.monotonic() - began_s}
        on_progress("connect", 0, 0)
        step_sockets, collective_sockets = _connect(spec, listener, group_address)
        for connected in (*step_sockets, *collective_sockets):
            opened.callback(connected.close)
        phases_s["connect"] = time.monotonic() - began_s - sum(phases_s.values())
        runner, collectives, facts = _load_runner(spec, collective_sockets, on_progress, opened)
        phases_s["weights"] = time.monotonic() - began_s - sum(phases_s.values())
        channel = StepSender(step_sockets) if spec.rank == 0 else StepReceiver(step_sockets[0])
        return cls(
            spec=spec,
            runner=runner,
            collectives=collectives,
            channel=channel,
            phases_s=phases_s,
            **facts,
        )

    def warm_up(self) -> None:
        """Rank 0: one real prefill and one decode on every rank, so that the first request is fast.

        Uses block 0, which is rewritten before anybody reads it.
        """
        began_s = time.monotonic()
        block_size = self.spec.model.engine.block_size
        num_tokens = max(1, min(16, block_size) - 1)
        params = SamplingParams(seed=0, max_tokens=2, temperature=0.0)
        new = NewSequence(0, list(range(num_tokens)), num_tokens, params, [0])
        chunk = Chunk(0, 0, num_tokens, True)
        first = self._run_step(StepInput(0, [], [new], [], b"", b"", [chunk]))
        if num_tokens < block_size:
            slots, token_ids = array("i", [0]).tobytes(), array("i", first.token_ids).tobytes()
            self._run_step(StepInput(1, [], [], [], slots, token_ids, []))
        self._run_step(StepInput(_LAST_WARM_UP_STEP_ID, [0], [], [], b"", b"", []))
        self._limit_silence()
        self.phases_s["warm_up"] = time.monotonic() - began_s

    def make_engine(self) -> Engine:
        """Rank 0: the engine over all ranks."""
        model = self.spec.model
        limits = model.engine
        settings = EngineSettings(
            max_running_sequences=limits.max_running_sequences,
            token_budget=limits.budget(self.spec.hardware.device),
            max_step_s=limits.max_step_s,
            max_decode_slowdown=limits.max_decode_slowdown,
            max_waiting_requests=limits.max_waiting_requests,
            max_waiting_tokens=limits.max_waiting_tokens,
            block_size=limits.block_size,
            num_total_blocks=self.num_total_blocks,
            max_model_len=self.max_model_len,
            eos_token_ids=read_eos_token_ids(_folder(model)),
            prefix_cache=limits.prefix_cache,
            lookahead=self.spec.hardware.device == "cuda",
        )
        return Engine(self._group_runner(), settings, grammars=self._grammars())

    def follow(self) -> None:
        """Other ranks: take part in every step until rank 0 closes the channel."""
        assert isinstance(self.channel, StepReceiver)
        steps = self.channel.steps()
        for step in steps:
            self._take_part(step)
            if step.step_id == _LAST_WARM_UP_STEP_ID:
                break
        self._limit_silence()
        for step in steps:
            self._take_part(step)

    def close(self) -> None:
        """Leave the group where the process goes on; otherwise its end is enough."""
        self.channel.close()
        if self.collectives is not None:
            self.collectives.close()

    def _limit_silence(self) -> None:
        if self.collectives is not None:
            self.collectives.limit_silence(self.spec.silence_s)

    def _take_part(self, step: StepInput) -> None:
        self.runner.start(step)
        self.runner.sample({})

    def _run_step(self, step: StepInput) -> StepOutput:
        runner = self._group_runner()
        runner.start(step)
        return runner.sample({}).result()

    def _group_runner(self) -> Runner:
        assert isinstance(self.channel, StepSender)
        return _GroupRunner(self.runner, self.channel)

    def _grammars(self) -> GrammarCompiler:
        folder = _folder(self.spec.model)
        return GrammarCompiler(
            folder / "tokenizer.json",
            eos_token_ids=read_eos_token_ids(folder),
            num_real_tokens=count_real_tokens(folder),
            vocab_size=self.vocab_size,
        )


def _connect(
    spec: ShardSpec, listener: socket.socket | None, group_address: str
) -> tuple[list[socket.socket], list[socket.socket]]:
    """Sockets of the step channel and of the collectives."""
    if spec.size == 1:
        return [], []
    if spec.rank == 0:
        assert listener is not None
        steps, collectives = accept_ranks(
            listener, size=spec.size, num_channels=2, secret=spec.secret, timeout_s=PEER_TIMEOUT_S
        )
        return steps, collectives
    step, collective = dial_root(
        group_address, rank=spec.rank, num_channels=2, secret=spec.secret, timeout_s=PEER_TIMEOUT_S
    )
    return [step], [collective]


def _folder(model: ModelConfig) -> Path:
    assert model.path is not None, "the planner resolved the path"
    return model.path


def _load_runner(
    spec: ShardSpec, sockets: list[socket.socket], on_progress: Progress, opened: ExitStack
) -> tuple[Any, Collectives | None, dict[str, Any]]:
    model = spec.model
    if model.stand_in is not None:
        runner, facts = _load_stand_in(spec)
        return runner, None, facts
    # Imported here so that a stand-in needs no kernels.
    from serve.runner.loading import load_runner

    assert model.dtype != "auto", "the planner resolved it"
    assert model.max_model_len != "auto", "the planner resolved it"
    assert isinstance(spec.hardware.threads_per_shard, int), "the planner resolved it"
    folder = _folder(model)
    limits = model.engine
    collectives, check_group = _meet(spec, sockets)
    opened.callback(collectives.close)
    runner = load_runner(
        path=folder,
        collectives=collectives,
        dtype=model.dtype,
        block_size=limits.block_size,
        num_threads=spec.hardware.threads_per_shard,
        num_real_tokens=count_real_tokens(folder),
        eos_token_ids=read_eos_token_ids(folder),
        max_running_sequences=limits.max_running_sequences,
        device=spec.hardware.device,
        kernels=spec.hardware.kernels,
        kv_cache_tokens=None if limits.kv_cache_tokens == "auto" else limits.kv_cache_tokens,
        max_model_len=model.max_model_len,
        yarn=model.yarn is True,
        token_budget=limits.budget(spec.hardware.device),
        check_group=check_group,
        on_progress=lambda num_bytes, num_total: on_progress("weights", num_bytes, num_total),
    )
    facts = {
        name: getattr(runner.facts, name)
        for name in (
            "num_total_blocks",
            "num_weight_bytes",
            "num_read_bytes",
            "max_model_len",
            "vocab_size",
            "kernels",
        )
    }
    return runner, collectives, facts


def _meet(
    spec: ShardSpec, sockets: list[socket.socket]
) -> tuple[Collectives, Callable[[], None] | None]:
    """The rank's collectives, and for ranks on GPUs what raises when their group is broken."""
    timeout_s = spec.model.build_timeout_s
    if spec.hardware.device == "cpu" or spec.size == 1:
        from serve.shards.collectives import make_collectives

        return make_collectives(spec.rank, spec.size, sockets, timeout_s), None
    import torch

    from serve.runner.cuda_loading import check_device
    from serve.shards.nccl import DeviceGroup

    device = torch.device("cuda", 0)  # Ray shows each shard its own GPU alone
    check_device(device)
    group = DeviceGroup(
        rank=spec.rank,
        size=spec.size,
        sockets=sockets,
        device=device,
        timeout_s=timeout_s,
    )
    return group, group.check


def _load_stand_in(spec: ShardSpec) -> tuple[Any, dict[str, Any]]:
    """A runner without a model: only rank 0 takes time."""
    assert spec.model.stand_in is not None
    engine = spec.model.engine
    step_s = spec.model.stand_in.step_ms / 1000 if spec.rank == 0 else 0.0
    vocab_size = count_real_tokens(_folder(spec.model))
    assert isinstance(engine.kv_cache_tokens, int)
    assert isinstance(spec.model.max_model_len, int)
    num_blocks = engine.kv_cache_tokens // engine.block_size
    facts = {
        "num_total_blocks": num_blocks,
        "num_weight_bytes": 0,
        "num_read_bytes": 0,
        "max_model_len": spec.model.max_model_len,
        "vocab_size": vocab_size,
        "kernels": "",
    }
    return StandInRunner(step_s, num_blocks, vocab_size), facts
