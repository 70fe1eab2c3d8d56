"""The engine on a real model: bytes do not depend on company, cached prefixes or preemption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from serve.config import Kernels
from serve.engine.engine import Engine
from serve.engine.settings import EngineSettings
from serve.kernels import native
from serve.model.tensor_parallel import SingleRank
from serve.runner.loading import load_runner
from serve.testing.checkpoints import make_checkpoint
from serve.testing.drive import generate_request, run

BLOCK_SIZE = 16
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2},
    {"temperature": 1.0, "presence_penalty": 0.5, "min_tokens": 20, "logit_bias": {7: 2.0}},
    {"temperature": 1.2, "top_k": 30, "min_p": 0.02, "logprobs": 0},
]
# Prompts that share their first 40 tokens, two full blocks, but for every fourth.
PREFIX = [(11 * i) % 128 for i in range(40)]
REQUESTS = [
    generate_request(
        i,
        [*(PREFIX if i % 4 else PREFIX[::-1]), *range(i, 3 * i + 1)],
        seed=i,
        max_tokens=24,
        ignore_eos=True,
        **KINDS[i % len(KINDS)],
    )
    for i in range(10)
]

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    return make_checkpoint(folder, num_heads=7, num_kv_heads=1, head_dim=32)


@pytest.fixture(params=["torch", "native"])
def make_engine(request: pytest.FixtureRequest, checkpoint: Path) -> MakeEngine:
    library = native.load()
    if request.param == "native" and library is None:
        pytest.skip(native.reason())
    kernels = cast(Kernels, "torch" if request.param == "torch" or not library else library.isa)

    def make(num_blocks: int, *, token_budget: int = 64, prefix_cache: bool = True) -> Engine:
        runner = load_runner(
            path=checkpoint,
            collectives=SingleRank(),
            dtype="bfloat16",
            block_size=BLOCK_SIZE,
            num_threads=1,
            num_real_tokens=128,
            eos_token_ids=(1,),
            max_running_sequences=8,
            token_budget=token_budget,
            kernels=kernels,
            kv_cache_tokens=num_blocks * BLOCK_SIZE,
        )
        settings = EngineSettings(
            max_running_sequences=8,
            token_budget=token_budget,
            max_step_s=100.0,
            max_waiting_requests=99,
            max_waiting_tokens=9999,
            block_size=BLOCK_SIZE,
            num_total_blocks=num_blocks,
            max_model_len=runner.facts.max_model_len,
            eos_token_ids=(1,),
            prefix_cache=prefix_cache,
        )
        return Engine(runner, settings)

    return make


def test_alone_together_preempted_and_from_the_cache_the_bytes_are_the_same(
    make_engine: MakeEngine,
) -> None:
    one = make_engine(200, prefix_cache=False)
    alone = [run(one, [request]).choices[i, 0] for i, request in enumerate(REQUESTS)]
    roomy, tight = make_engine(200), make_engine(14, token_budget=24)
    for engine in (roomy, tight, roomy):  # the last time from the cache
        choices = run(engine, REQUESTS).choices
        assert [choices[i, 0] for i in range(len(REQUESTS))] == alone
    assert roomy.load().num_preemptions_total == 0
    assert tight.load().num_preemptions_total > 0
    assert roomy.load().num_cache_hit_tokens_total > 0


def test_siblings_of_one_prompt_are_those_of_a_prompt_each(make_engine: MakeEngine) -> None:
    request = generate_request(0, PREFIX, n=4, seed=3, max_tokens=12, temperature=1.0)
    shared = run(make_engine(100), [request])
    apart = run(make_engine(100, prefix_cache=False), [request])
    assert shared.choices == apart.choices
    assert len({tuple(choice.token_ids) for choice in shared.choices.values()}) > 1
