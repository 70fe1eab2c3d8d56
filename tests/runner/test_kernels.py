"""Which kernels run: what was named, else the best that CPU and shape allow, and never silently."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import pytest

from serve.config import Kernels
from serve.errors import ConfigurationError, ShoalError
from serve.kernels import native
from serve.messages import SamplingParams
from serve.model.tensor_parallel import Collectives, SingleRank
from serve.runner.loading import load_runner
from serve.runner.model_runner import ModelRunner
from serve.testing.checkpoints import make_checkpoint
from serve.testing.ranks import run_ranks
from serve.testing.steps import answer

GREEDY = SamplingParams(seed=0, max_tokens=9, temperature=0.0)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a head_dim that no native kernel computes."""
    return make_checkpoint(tmp_path_factory.mktemp("narrow"), head_dim=16)


@pytest.fixture
def isa() -> Kernels:
    library = native.load()
    if library is None:
        pytest.skip(native.reason())
    return cast(Kernels, library.isa)


def _load(path: Path, **options: Any) -> ModelRunner:
    settings: dict[str, Any] = {
        "collectives": SingleRank(),
        "dtype": "float32",
        "block_size": 16,
        "num_threads": 1,
        "num_real_tokens": 100,
        "eos_token_ids": (),
        "max_running_sequences": 2,
        "token_budget": 512,
        "kv_cache_tokens": 640,
    }
    return load_runner(path=path, **settings | options)


def test_native_kernels_run_where_nobody_chose(
    checkpoint: Path, isa: Kernels, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "shoal.shard")
    assert _load(checkpoint).facts.kernels == isa
    assert caplog.messages == [f"CPU kernels: {isa} (this CPU has {isa}); threads a shard: 1"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "head_dim must be one of 32, 64, 128, got 16"),
        ({"block_size": 8}, "engine.block_size must be one of 16, 32, got 8"),
    ],
)
def test_a_shape_without_native_kernels_is_refused_by_name_and_else_torchs(
    checkpoint: Path,
    narrow: Path,
    isa: Kernels,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    reason: str,
):
    caplog.set_level(logging.INFO, "shoal.shard")
    path = checkpoint if options else narrow
    with pytest.raises(ConfigurationError, match=f"hardware.kernels is {isa}, but {reason}"):
        _load(path, kernels=isa, **options)
    runner = _load(path, **options)
    assert runner.facts.kernels == "torch"
    assert f"CPU kernels: torch ({reason}); threads a shard: 1" in caplog.messages
    block_size = options.get("block_size", 16)
    found = answer(runner, [1, 2, 3], GREEDY, num_tokens=4, block_size=block_size)
    assert len(found.token_ids) == 4


@pytest.mark.parametrize("torch_rank", [0, 1])
def test_ranks_of_which_one_alone_computes_in_torch_refuse_to_start(
    checkpoint: Path, isa: Kernels, torch_rank: int
):
    def refusal(rank: Collectives) -> str:
        kernels = "torch" if rank.rank == torch_rank else isa
        with pytest.raises(ShoalError) as caught:
            _load(checkpoint, collectives=rank, kernels=kernels)
        return f"{caught.value.code}: {caught.value}"

    refusals = run_ranks(2, refusal)
    assert refusals[torch_rank] == (
        f"configuration: rank {torch_rank} has no CPU kernels (hardware.kernels is torch),"
        f" rank {1 - torch_rank} has: give every rank's machine the same, or set hardware.kernels"
        " to torch"
    )
    assert refusals[1 - torch_rank] == (
        f"collective: rank {torch_rank} has no CPU kernels, this rank has"
    )


@pytest.mark.parametrize("is_promised", [False, True])
def test_a_cache_beyond_the_systems_memory_is_refused_by_its_size(
    checkpoint: Path, kernels: Kernels, monkeypatch: pytest.MonkeyPatch, is_promised: bool
):
    if is_promised:  # so that the system itself refuses
        monkeypatch.setattr("serve.runner.kv_pool._all_memory_bytes", lambda: 1 << 80)
    reason = (
        r"a KV cache of \d+ blocks takes [\d.]+ GB a shard, more than this machine gives"
        r" \([\d.]+ GB in all, [\d.]+ GB free\): lower engine.kv_cache_tokens"
    )
    with pytest.raises(ConfigurationError, match=reason):
        _load(checkpoint, kernels=kernels, kv_cache_tokens=2**44)
