"""Loaded ranks in processes: when the silence of one counts, and which of them import torch."""

from __future__ import annotations

import pickle
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from serve.config import EngineConfig, HardwareConfig, Kernels, ModelConfig
from serve.errors import CollectiveError
from serve.kernels import native
from serve.shards.loading import LoadedShard, group_listener
from serve.shards.spec import ShardSpec
from serve.testing.checkpoints import add_demo_tokenizer, make_checkpoint
from serve.testing.drive import generate_request, run
from serve.transport.rendezvous import SECRET_BYTES

SILENCE_S = 3.0

_MAIN = """
import pickle, sys
from serve.shards.loading import LoadedShard
LoadedShard.load(
    pickle.loads(bytes.fromhex(sys.argv[1])), listener=None, group_address=sys.argv[2],
    on_progress=lambda *_: None, began_s=0.0,
).follow()
"""

_ROOT = """
import pickle, sys
from serve.shards.loading import LoadedShard, group_listener
spec = pickle.loads(bytes.fromhex(sys.argv[1]))
listener, address = group_listener(spec.socket_dir)
print(address, flush=True)
shard = LoadedShard.load(
    spec, listener=listener, group_address="", on_progress=lambda *_: None, began_s=0.0
)
shard.warm_up()
shard.make_engine()
shard.close()
"""
_SAY = 'print("torch" in sys.modules)'


@pytest.fixture
def specs(tmp_path: Path) -> list[ShardSpec]:
    """Two ranks of a small model."""
    path = add_demo_tokenizer(make_checkpoint(tmp_path / "model", vocab_size=8192))
    model = ModelConfig(
        name="m",
        path=path,
        dtype="float32",
        max_model_len=512,
        yarn=False,
        engine=EngineConfig(kv_cache_tokens=1024),
    )
    hardware = HardwareConfig(threads_per_shard=1)
    secret = secrets.token_bytes(SECRET_BYTES)
    return [
        ShardSpec(model, hardware, rank, 2, "r", "", secret, str(tmp_path), SILENCE_S)
        for rank in range(2)
    ]


@pytest.fixture
def group(specs: list[ShardSpec]) -> Iterator[tuple[LoadedShard, subprocess.Popen[bytes]]]:
    """Rank 0, warm, and the process of rank 1."""
    listener, address = group_listener(specs[0].socket_dir)
    process = subprocess.Popen([sys.executable, "-c", _MAIN, pickle.dumps(specs[1]).hex(), address])
    shard = LoadedShard.load(
        specs[0],
        listener=listener,
        group_address="",
        on_progress=lambda *_: None,
        began_s=time.monotonic(),
    )
    shard.warm_up()
    yield shard, process
    process.kill()
    process.wait()
    shard.close()


def test_an_idle_group_may_be_silent_and_a_rank_frozen_in_a_step_may_not(
    group: tuple[LoadedShard, subprocess.Popen[bytes]],
) -> None:
    root, follower = group
    engine = root.make_engine()
    threading.Event().wait(1.5 * SILENCE_S)  # nobody asks for anything
    engine.add(generate_request(1, [5, 6], max_tokens=400, ignore_eos=True))
    for _ in range(3):
        engine.step()

    follower.send_signal(signal.SIGSTOP)

    with pytest.raises(CollectiveError, match=r"rank 1 was silent for 3 s"):
        run(engine)


@pytest.mark.skipif(native.load() is None, reason="no compiled kernels run on this CPU")
@pytest.mark.parametrize(("kernels", "has_torch"), [("auto", False), ("torch", True)])
def test_ranks_import_torch_where_it_computes_and_nowhere_else(
    specs: list[ShardSpec], tmp_path: Path, kernels: Kernels, has_torch: bool
) -> None:
    path = make_checkpoint(tmp_path / "wide", head_dim=32, vocab_size=8192, dtype="bfloat16")
    model = specs[0].model.model_copy(update={"path": add_demo_tokenizer(path)})
    hardware = HardwareConfig(threads_per_shard=1, kernels=kernels)
    wanted = [replace(spec, model=model, hardware=hardware) for spec in specs]
    root = _start(f"{_ROOT}{_SAY}", wanted[0])
    assert root.stdout is not None
    follower = _start(f"{_MAIN}{_SAY}", wanted[1], root.stdout.readline().strip())
    assert [process.communicate()[0].strip() for process in (root, follower)] == [
        str(has_torch)
    ] * 2


def _start(script: str, spec: ShardSpec, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, pickle.dumps(spec).hex(), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
