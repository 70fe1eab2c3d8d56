"""Steps in, tokens out: at any tensor-parallel size, alone or in a batch, before and after
preemption, the same tokens and the same logprobs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from serve.config import Kernels
from serve.errors import CheckpointError, CollectiveError, ConfigurationError
from serve.messages import SamplingParams, StepOutput
from serve.model.tensor_parallel import Collectives, SingleRank
from serve.runner.loading import load_runner
from serve.runner.model_runner import ModelRunner
from serve.shards.collectives import make_collectives
from serve.testing.ranks import MakeCollectives, connected_ranks, over_sockets, run_ranks
from serve.testing.steps import Answer, StepWriter, answer

BLOCK_SIZE = 16
NUM_REAL_TOKENS = 140
MAX_SLOTS = 20
PROMPT = [7, 99, 3, 120, 55, 8, 8, 31, 64, 17, 2, 0, 88, 139, 5, 71, 23, 42, 11, 90]
GREEDY = SamplingParams(seed=1, max_tokens=99, temperature=0.0, logprobs=2)
SEEDED = SamplingParams(seed=5, max_tokens=99, temperature=0.9, top_p=0.95, logprobs=2)

Load = Callable[..., ModelRunner]


@pytest.fixture
def load(checkpoint: Path, kernels: Kernels) -> Load:
    def load(rank: Collectives | None = None, **options: Any) -> ModelRunner:
        settings: dict[str, Any] = {
            "dtype": "float32",
            "block_size": BLOCK_SIZE,
            "num_threads": 1,
            "num_real_tokens": NUM_REAL_TOKENS,
            "eos_token_ids": (149,),
            "max_running_sequences": MAX_SLOTS,
            "token_budget": 512,
            "kv_cache_tokens": 40 * BLOCK_SIZE,
            "kernels": kernels,
        }
        return load_runner(path=checkpoint, collectives=rank or SingleRank(), **settings | options)

    return load


def _answer(
    runner: ModelRunner, params: SamplingParams, num_tokens: int, *, tells_tokens: bool = True
) -> Answer:
    return answer(
        runner,
        PROMPT,
        params,
        num_tokens=num_tokens,
        block_size=BLOCK_SIZE,
        tells_tokens=tells_tokens,
    )


def _told(runner: ModelRunner, token_ids: list[int]) -> list[int]:
    """As `_answer` with greedy sampling, each next token told instead of sampled here, so that
    every rank runs the same steps."""
    writer = StepWriter(runner, BLOCK_SIZE)
    writer.add(0, PROMPT, GREEDY)
    found = writer.step(chunks=[(0, 0, len(PROMPT))]).token_ids
    for token_id in token_ids:
        writer.answers[0].token_ids.append(token_id)
        found += writer.step([0]).token_ids
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_64_greedy_tokens_equal_transformers_at_every_size(
    checkpoint: Path, load: Load, kernels: Kernels, size: int
):
    model: Any = Qwen2ForCausalLM.from_pretrained(checkpoint)
    ids = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        max_new_tokens=64,
        eos_token_id=-1,
        do_sample=False,
        suppress_tokens=list(range(NUM_REAL_TOKENS, 150)),
    )
    expected = ids[0, len(PROMPT) :].tolist()

    make = over_sockets if kernels == "torch" else make_collectives
    answers = run_ranks(size, lambda rank: _told(load(rank), expected[:-1]), make=make)
    assert answers[0] == expected
    assert answers[1:] == [[]] * (size - 1)


def test_padded_ids_are_never_sampled(load: Load):
    params = SamplingParams(seed=1, max_tokens=60, temperature=100.0)
    ids = set(_answer(load(num_real_tokens=20), params, 60).token_ids)
    assert max(ids) < 20
    assert len(ids) > 5


def test_tokens_that_are_not_told_are_the_runners_own(load: Load):
    runner = load()
    told = _answer(runner, SEEDED, 30)
    assert _answer(runner, SEEDED, 30, tells_tokens=False) == told


def _in_company(runner: ModelRunner) -> StepWriter:
    """Slots 1 (greedy) and 2 (seeded) among 14 others, prompts in chunks, joined late."""
    writer = StepWriter(runner, BLOCK_SIZE)
    others = range(3, 17)
    for i in others:
        writer.add(i, [(i * 31 + k) % 140 for k in range(2 * i - 3)], SEEDED)
    writer.step(chunks=[(i, 0, 2 * i - 3) for i in others])
    writer.add(1, PROMPT, GREEDY)
    writer.add(2, PROMPT, SEEDED)
    writer.step(others, [(1, 0, 7), (2, 0, 16)])
    writer.step(chunks=[(2, 16, len(PROMPT)), (1, 7, len(PROMPT))])
    for position in range(39):
        company = others if position % 3 else range(0)
        writer.step([*company[:5], 2, *company[5:], 1])
    return writer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_in_a_batch_of_sixteen_are_those_alone_logprobs_included(load: Load, dtype: str):
    options = {"dtype": dtype, "kv_cache_tokens": 200 * BLOCK_SIZE}
    writer = _in_company(load(**options))
    runner = load(**options)
    assert writer.answers[1] == _answer(runner, GREEDY, 40)
    assert writer.answers[2] == _answer(runner, SEEDED, 40)


def test_a_preempted_sequence_resumes_with_the_same_tokens(load: Load):
    runner = load()
    alone = _answer(runner, SEEDED, 40)
    writer = StepWriter(runner, BLOCK_SIZE)
    writer.add(2, PROMPT, SEEDED)
    writer.step(chunks=[(2, 0, len(PROMPT))])
    for _ in range(12):
        writer.step([2])
    writer.release(2)
    output = list(writer.answers[2].token_ids)
    length = len(PROMPT) + len(output)
    writer.add(5, PROMPT, SEEDED, output=output)
    writer.step(chunks=[(5, 0, 9)])
    writer.step(chunks=[(5, 9, length)])
    for _ in range(26):
        writer.step([5])
    assert writer.answers[2].token_ids + writer.answers[5].token_ids == alone.token_ids
    assert writer.answers[2].logprobs + writer.answers[5].logprobs == alone.logprobs


def test_a_sequence_that_shares_computed_blocks_gives_the_same_answer(load: Load):
    runner = load()
    alone = _answer(runner, SEEDED, 20)
    writer = StepWriter(runner, BLOCK_SIZE)
    writer.add(0, PROMPT, GREEDY)
    writer.step(chunks=[(0, 0, len(PROMPT))])
    writer.add(1, PROMPT, SEEDED, shared_blocks=[0])
    writer.step([0], [(1, BLOCK_SIZE, len(PROMPT))])
    for _ in range(19):
        writer.step([0, 1])
    assert writer.answers[1] == alone


def test_a_slot_forgets_the_sequence_before(load: Load):
    runner = load()
    penalized = SamplingParams(seed=5, max_tokens=99, repetition_penalty=3.0, min_tokens=50)
    alone = _answer(runner, SEEDED, 10)
    _answer(runner, penalized, 10)
    assert _answer(runner, SEEDED, 10) == alone


def test_a_mask_restricts_the_choice(load: Load):
    mask = np.zeros(5, np.uint32)
    mask[77 // 32] = 1 << (77 % 32)
    writer = StepWriter(load(), BLOCK_SIZE)
    writer.add(3, PROMPT, SEEDED)
    writer.add(4, PROMPT, SEEDED)
    chunks = [(slot, 0, len(PROMPT)) for slot in (3, 4)]
    assert writer.step(chunks=chunks, masks={4: mask}).token_ids[1] == 77
    assert writer.answers[3].token_ids != [77]


def test_a_step_that_samples_nothing_has_no_tokens(load: Load):
    writer = StepWriter(load(), BLOCK_SIZE)
    writer.add(1, PROMPT, GREEDY)
    assert writer.step(chunks=[(1, 0, 5)]) == StepOutput(1, [])
    writer.release(1)
    assert writer.step() == StepOutput(2, [])


def test_the_pool_is_cut_into_whole_blocks_the_same_on_every_rank(load: Load):
    assert load(kv_cache_tokens=10 * BLOCK_SIZE + 15).facts.num_total_blocks == 10
    sizes = run_ranks(2, lambda rank: load(rank, kv_cache_tokens=None).facts.num_total_blocks)
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"max_model_len": 513}, ConfigurationError, "max_model_len must be <= 512"),
        ({"kv_cache_tokens": 15}, ConfigurationError, "at least one block"),
        ({"yarn": True}, ConfigurationError, "7B and larger"),
        ({"num_real_tokens": 151}, CheckpointError, "vocab_size is 150"),
    ],
)
def test_options_that_do_not_fit_the_checkpoint_are_refused(load, options, error, reason):
    with pytest.raises(error, match=reason):
        load(**options)


def test_an_illegal_size_is_refused_on_every_rank(load: Load):
    with pytest.raises(ConfigurationError, match="must be one of 1, 2, 4, 8, got 3"):
        run_ranks(3, load)


@pytest.mark.parametrize("make", [over_sockets, make_collectives])
def test_a_dead_rank_fails_the_call_that_samples(load: Load, make: MakeCollectives):
    ranks = connected_ranks(2, make=make)
    with closing(ranks[0]):
        with ThreadPoolExecutor(2) as threads:
            runner, _ = threads.map(load, ranks)
        ranks[1].close()
        with pytest.raises(CollectiveError, match="rank 1 is gone"):
            _answer(runner, GREEDY, 2)
