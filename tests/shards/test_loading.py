"""A loaded rank 0 in this process, rank 1 in one of its own: when the silence of a rank counts."""

from __future__ import annotations

import pickle
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.config import EngineConfig, HardwareConfig, ModelConfig
from serve.errors import CollectiveError
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
