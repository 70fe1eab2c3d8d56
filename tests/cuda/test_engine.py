"""The engine one step ahead of a device gives the bytes of the engine that waits for a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from serve.engine.engine import Engine
from serve.engine.settings import EngineSettings
from serve.runner.cuda import CudaRunner
from serve.runner.model_runner import ModelRunner
from serve.testing.drive import Choice, generate_request, run

BLOCK_SIZE = 16
EOS = 139
MAX_MODEL_LEN = 96

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1},
    {"temperature": 1.2, "presence_penalty": 0.5, "stop_token_ids": tuple(range(100, 108))},
    {"temperature": 0.0, "frequency_penalty": 0.5, "min_tokens": 9, "logit_bias": {7: 2.0}},
]
SHARED = list(range(20, 60))
REQUESTS = [
    generate_request(
        i, [*SHARED, 3 + i], seed=i, max_tokens=30 + 5 * i, n=1 + (i == 2), **KINDS[i % 4]
    )
    for i in range(10)
]


def _engine(runner: CudaRunner | ModelRunner, *, num_blocks: int, lookahead: bool) -> Engine:
    settings = EngineSettings(
        max_running_sequences=6,
        token_budget=48,
        max_step_s=60.0,
        max_waiting_requests=100,
        max_waiting_tokens=100_000,
        block_size=BLOCK_SIZE,
        num_total_blocks=num_blocks,
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=(EOS,),
        lookahead=lookahead,
    )
    return Engine(runner, settings)


def _answers(engine: Engine) -> dict[tuple[int, int], Choice]:
    return run(engine, REQUESTS).choices


@pytest.mark.parametrize("num_blocks", [100, 20], ids=["roomy", "preempting"])
def test_lookahead_on_a_device_gives_the_references_answers(
    load_device: Callable[..., CudaRunner], reference: ModelRunner, num_blocks: int
) -> None:
    wanted = _answers(_engine(reference, num_blocks=num_blocks, lookahead=False))
    found = _answers(_engine(load_device(), num_blocks=num_blocks, lookahead=True))
    assert {key: one.token_ids for key, one in found.items()} == {
        key: one.token_ids for key, one in wanted.items()
    }
    assert {one.finish_reason for one in found.values()} == {"length", "stop"}
    assert max(len(one.token_ids) for one in found.values()) == MAX_MODEL_LEN - len(SHARED) - 1
