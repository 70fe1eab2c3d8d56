"""Our engine without Ray: rank 0 in this process, every other rank in one of its own.

The shards' own loading, channels and collectives, so that what is measured is what is served; only
the actors and the token sockets around them are missing.
"""

from __future__ import annotations

import contextlib
import pickle
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.config import EngineConfig, HardwareConfig, ModelConfig
from serve.engine.engine import Engine
from serve.engine.ledger import StepResult
from serve.errors import CollectiveError
from serve.messages import GenerateRequest, Prompt, SamplingParams, StreamAddress
from serve.shards.loading import LoadedShard, Progress, group_listener
from serve.shards.spec import ShardSpec
from serve.transport.rendezvous import SECRET_BYTES


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """What a benchmark chooses; everything else is the product's default."""

    folder: Path
    num_ranks: int = 1
    num_threads: int = 1
    dtype: str = "bfloat16"
    kernels: str = "auto"
    kv_cache_tokens: int = 32_768
    max_model_len: int = 32_768
    max_running_sequences: int = 64


class RankFailedError(Exception):
    """A rank other than 0 failed; the message is its own error."""


class LocalGroup:
    """A loaded engine. `close` (or leaving the context) ends the other ranks.

    `on_progress` is told how far rank 0's loading is.

    Raises:
        RankFailedError: another rank failed, here or in `run`. After a failure here nothing is
            left behind either.
    """

    def __init__(
        self, options: GroupOptions, on_progress: Progress = lambda phase, done, total: None
    ) -> None:
        self.options = options
        self._num_requests = 0
        self._opened = contextlib.ExitStack()
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.close)
            self._folder = self._opened.enter_context(
                tempfile.TemporaryDirectory(prefix="shoal-b-")
            )
            with self._naming_failures():
                self.shard = self._start_ranks(on_progress)
                self.shard.warm_up()
            self.engine: Engine = self.shard.make_engine()
            on_failure.pop_all()

    def __enter__(self) -> LocalGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def kernels(self) -> str:
        """Which kernels compute, in the runner's words."""
        kernels: str = self.shard.runner.facts.kernels
        return kernels

    def add(
        self, prompt: list[int], *, num_tokens: int, namespace: bytes = b"", **sampling: Any
    ) -> int:
        """Admit one greedy sequence that ends after `num_tokens`; returns its stream id."""
        self._num_requests += 1
        params = {"seed": 0, "temperature": 0.0, "ignore_eos": True, **sampling}
        self.engine.add(
            GenerateRequest(
                request_id=f"b{self._num_requests}",
                model="bench",
                prompts=[Prompt(prompt)],
                sampling=SamplingParams(max_tokens=num_tokens, **params),
                namespace=namespace,
                stream=StreamAddress("", b"", self._num_requests),
            )
        )
        return self._num_requests

    def run(self, on_result: Callable[[StepResult], None]) -> None:
        """Step until the engine is empty, as the engine loop does; each step is told."""
        engine = self.engine
        with self._naming_failures():
            while engine.has_work:
                engine.start_step()
                on_result(engine.take_result())
                engine.finish_step()

    def close(self) -> None:
        """End every other rank, and leave nothing behind."""
        self._opened.close()

    def _start_ranks(self, on_progress: Progress) -> LoadedShard:
        """Every rank; what `close` has to end gathers in `_opened`, the last first."""
        listener, address = None, ""
        if self.options.num_ranks > 1:
            listener, address = group_listener(self._folder)
            self._opened.callback(listener.close)
        specs = _specs(self.options, self._folder)
        for spec in specs[1:]:
            self._opened.callback(_end, _start(spec, address))
        return _load(specs[0], listener, address, on_progress, opened=self._opened)

    @contextlib.contextmanager
    def _naming_failures(self) -> Iterator[None]:
        """Rank 0 only sees that another one is gone: say why."""
        try:
            yield
        except CollectiveError as exc:
            found = sorted(Path(self._folder).glob("*.failure"))
            if found:
                raise RankFailedError("; ".join(path.read_text() for path in found)) from exc
            raise


def _specs(options: GroupOptions, folder: str) -> list[ShardSpec]:
    secret = secrets.token_bytes(SECRET_BYTES)
    model = ModelConfig.model_validate(
        {
            "name": "bench",
            "path": options.folder,
            "tensor_parallel": options.num_ranks,
            "dtype": options.dtype,
            "max_model_len": options.max_model_len,
            "yarn": False,
            "engine": EngineConfig(
                kv_cache_tokens=options.kv_cache_tokens,
                max_running_sequences=options.max_running_sequences,
            ),
        }
    )
    hardware = HardwareConfig.model_validate(
        {"threads_per_shard": options.num_threads, "kernels": options.kernels}
    )
    return [
        ShardSpec(model, hardware, rank, options.num_ranks, "bench", "", secret, folder)
        for rank in range(options.num_ranks)
    ]


def _load(
    spec: ShardSpec,
    listener: Any,
    address: str,
    on_progress: Progress = lambda phase, done, total: None,
    *,
    opened: contextlib.ExitStack | None = None,
) -> LoadedShard:
    return LoadedShard.load(
        spec,
        listener=listener,
        group_address=address,
        on_progress=on_progress,
        began_s=time.monotonic(),
        opened=opened,
    )


def _start(spec: ShardSpec, address: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "scripts.bench.local_group", pickle.dumps(spec).hex(), address]
    return subprocess.Popen(command)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait()


def main() -> None:
    """A rank other than 0: follows until rank 0 ends."""
    spec: ShardSpec = pickle.loads(bytes.fromhex(sys.argv[1]))
    try:
        _load(spec, None, sys.argv[2]).follow()
    except Exception as exc:  # for rank 0 to read; the socket that tells it so ends after this
        failure = Path(spec.socket_dir) / f"rank{spec.rank}.failure"
        failure.write_text(f"rank {spec.rank}: {exc}")
        raise


if __name__ == "__main__":
    main()
