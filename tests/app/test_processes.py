"""What the live processes of the HTTP and replica tiers hold, and how they are called."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from serve.kernels import native

from .conftest import REPOSITORY, Running

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

MAX_RSS_BYTES = 250 * 1024 * 1024

_ASK = """
import json, sys
import ray
ray.init(address=sys.argv[1], namespace="serve", logging_level="ERROR", log_to_driver=False)
actors = [ray.get_actor(name) for name in sys.argv[2:]]
ask = lambda self: [name for name in ("torch", "transformers", "accelerate") if name in
                    __import__("sys").modules]
print(json.dumps(ray.get([actor.__ray_call__.remote(ask) for actor in actors])))
"""


def test_ingress_and_replicas_hold_no_torch_and_stay_small(shoal: Running) -> None:
    names = [
        shoal.serve_actor("Ingress", "shoal"),
        shoal.serve_actor("Replica", "model-demo"),
        shoal.serve_actor("Replica", "model-random"),
    ]
    (port,) = (shoal.folder / "r/session_latest").glob("gcs_server_port_*")
    answer = subprocess.run(
        [sys.executable, "-c", _ASK, f"127.0.0.1:{port.read_text()}", *names],
        env={
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(shoal.folder / "token"),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the run's Ray is on loopback
        },
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPOSITORY,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout.splitlines()[-1]) == [[], [], []]
    pids = shoal.actors()
    for name in names:
        assert psutil.Process(pids[name]).memory_info().rss <= MAX_RSS_BYTES, name


@pytest.mark.skipif(native.load("auto") is None, reason="no compiled kernels run on this CPU")
@pytest.mark.parametrize("rank", [0, 1])
def test_shards_in_native_kernels_hold_no_torch_and_stay_small(shoal: Running, rank: int) -> None:
    pid = shoal.shard("demo", rank)
    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    assert psutil.Process(pid).memory_info().rss <= MAX_RSS_BYTES


def test_logs_tell_what_each_shard_read_of_its_checkpoint(shoal: Running) -> None:
    logs = subprocess.run(
        [sys.executable, "-m", "cluster", "logs", "--name", shoal.name, "-n", "1000"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPOSITORY,
        check=True,
    )
    assert "rank 0 read 4.4 MB of the checkpoint, rank 1 read 4.4 MB" in logs.stdout


def test_actors_are_named_model_replica_rank(shoal: Running) -> None:
    shards = sorted(name for name in shoal.actors() if name.startswith("demo/"))
    assert [name.rpartition("/")[2] for name in shards] == ["rank0", "rank1"]
    replica = shoal.serve_actor("Replica", "model-demo").rpartition("#")[2]
    assert {name.split("/")[1] for name in shards} == {replica}
