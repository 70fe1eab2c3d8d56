"""One running Shoal for all tests of this folder: three models behind one HTTP tier, on real Ray.

`demo` is the model that ships, `random` a random checkpoint, `paced` the demo's text with a step of
20 ms in the model's place; each has two shards.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cluster.local.folder import runs_path
from cluster.local.ports import find_free_ports

REPOSITORY = Path(__file__).parents[2]
START_TIMEOUT_S = 240.0
# How long one answer may take: only there to end a test that would hang.
ANSWER_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Running:
    """A Shoal that serves; `random_path` is the folder of the model `random`."""

    name: str
    port: int
    folder: Path
    random_path: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.folder / "state.json").read_text())
        return state

    def dashboard(self, path: str) -> Any:
        """GET from Ray's dashboard with the run's token."""
        token = (self.folder / "token").read_text().strip()
        answer = httpx.get(
            f"http://127.0.0.1:{self.state()['dashboard_port']}{path}",
            headers={"Authorization": f"Bearer {token}"},
            timeout=ANSWER_TIMEOUT_S,
        )
        answer.raise_for_status()
        return answer.json()

    def actors(self) -> dict[str, int]:
        """Process ids of living actors by name."""
        found = self.dashboard("/api/v0/actors?limit=1000&detail=true&timeout=60")
        rows = found["data"]["result"]["result"]
        return {row["name"]: row["pid"] for row in rows if row["state"] == "ALIVE" and row["name"]}

    def shard(self, model: str, rank: int) -> int:
        """Process id of a model's shard."""
        return next(
            pid
            for name, pid in self.actors().items()
            if name.startswith(f"{model}/") and f"/rank{rank}" in name
        )

    def replica(self, model: str) -> int:
        """Process id of a model's one replica."""
        return self.actors()[self.serve_actor("Replica", f"model-{model}")]

    def serve_actor(self, deployment: str, application: str) -> str:
        """Name of the one actor of a Serve deployment."""
        return next(name for name in self.actors() if f"{application}#{deployment}#" in name)

    def metric(self, name: str, model: str) -> float:
        """A model's value of a metric, summed over replicas; asked again of one that was late."""
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while True:
            text = httpx.get(f"{self.url}/metrics", timeout=ANSWER_TIMEOUT_S).text
            found = [
                float(line.rpartition(" ")[2])
                for line in text.splitlines()
                if line.startswith(f"{name}{{") and f'model_name="{model}"' in line
            ]
            if found:
                return sum(found)
            assert time.monotonic() < deadline, f"no {name} of {model}:\n{text}"

    def wait_answer(self, model: str) -> float:
        """Seconds until a completion of `model` is answered; refusals meanwhile are fine."""
        began = time.monotonic()
        while True:
            answer = httpx.post(
                f"{self.url}/v1/completions",
                json={"model": model, "prompt": "Hello", "max_tokens": 2},
                timeout=ANSWER_TIMEOUT_S,
            )
            elapsed = time.monotonic() - began
            if answer.status_code == 200:
                return elapsed
            assert answer.status_code in (429, 503), answer.text
            assert elapsed < ANSWER_TIMEOUT_S, answer.text


def _write_config(folder: Path, port: int) -> Path:
    from serve.testing.checkpoints import add_demo_tokenizer, make_checkpoint

    random_path = make_checkpoint(
        folder / "random", num_heads=8, num_kv_heads=4, vocab_size=8192, max_positions=4096
    )
    add_demo_tokenizer(random_path)
    limits = "{kv_cache_tokens: 65536, max_running_sequences: 256}"
    config = folder / "shoal.yaml"
    config.write_text(
        f"""\
http: {{port: {port}}}
models:
  - {{preset: demo, name: demo, is_default: true, tensor_parallel: 2, longest_generation_s: 5}}
  - {{name: random, path: {random_path}, dtype: float32, tensor_parallel: 2,
      longest_generation_s: 5, engine: {limits}}}
  - {{preset: demo, name: paced, tensor_parallel: 2, longest_generation_s: 5,
      stand_in: {{step_ms: 20}}, engine: {limits}}}
"""
    )
    return config


@pytest.fixture(scope="session")
def shoal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A Shoal with three models, ended after the last test."""
    folder = tmp_path_factory.mktemp("app")
    port, name = find_free_ports(1)[0], f"t{uuid.uuid4().hex[:8]}"
    command = [sys.executable, "-m", "cluster"]
    config = _write_config(folder, port)
    up = subprocess.run(
        [*command, "up", str(config), "--name", name, "--detach"],
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        cwd=REPOSITORY,
        check=False,
    )
    assert up.returncode == 0, up.stdout + up.stderr
    try:
        yield Running(name, port, runs_path() / name, folder / "random")
    finally:
        subprocess.run([*command, "down", "--name", name], timeout=120, cwd=REPOSITORY, check=True)


def kill(pid: int) -> None:
    """SIGKILL to a process of the run."""
    psutil.Process(pid).kill()
