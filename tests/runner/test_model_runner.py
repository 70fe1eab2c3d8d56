"""Steps in, tokens out: at any tensor-parallel size, alone or in a batch, before and after
preemption, the same tokens and the same logprobs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from serve.errors import CheckpointError, CollectiveError, ConfigurationError
from serve.messages import (
    NewSequence,
    SampledToken,
    SamplingParams,
    ScheduledSequence,
    StepInput,
    StepOutput,
)
from serve.model.tensor_parallel import Collectives, SingleRank
from serve.runner.loading import load_runner
from serve.runner.model_runner import ModelRunner
from serve.testing.ranks import connected_ranks, run_ranks

BLOCK_SIZE = 16
NUM_REAL_TOKENS = 140
PROMPT = [7, 99, 3, 120, 55, 8, 8, 31, 64, 17, 2, 0, 88, 139, 5, 71, 23, 42, 11, 90]
GREEDY = SamplingParams(seed=1, max_tokens=99, temperature=0.0, logprobs=2)
SEEDED = SamplingParams(seed=5, max_tokens=99, temperature=0.9, top_p=0.95, logprobs=2)


def _load(path: Path, rank: Collectives, **options: Any) -> ModelRunner:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "block_size": BLOCK_SIZE,
        "num_threads": 1,
        "num_real_tokens": NUM_REAL_TOKENS,
        "eos_token_ids": (149,),
        "kv_cache_tokens": 40 * BLOCK_SIZE,
    }
    return load_runner(path=path, collectives=rank, **settings | options)


@dataclass
class _Driver:
    """Writes steps as the engine does, and keeps what came back."""

    runner: ModelRunner
    num_steps: int = 0
    next_block: int = 0
    tokens: dict[int, list[SampledToken]] = field(default_factory=dict)
    _unsent: dict[int, list[int]] = field(default_factory=dict)
    _lengths: dict[int, int] = field(default_factory=dict)
    _blocks: dict[int, int] = field(default_factory=dict)

    def step(
        self,
        parts: Iterable[tuple[int, int, int]],
        *,
        new: Iterable[NewSequence] = (),
        released: Iterable[int] = (),
    ) -> StepOutput | None:
        """Schedule (seq_id, first position, number of tokens) each."""
        for sequence in new:
            self._lengths[sequence.seq_id] = len(sequence.token_ids)
            self._blocks[sequence.seq_id] = 0
            self._unsent[sequence.seq_id] = []
        scheduled = []
        for seq_id, start, num_tokens in parts:
            unsent = self._unsent.pop(seq_id)
            self._unsent[seq_id] = []
            self._lengths[seq_id] += len(unsent)
            num_missing = -(-(start + num_tokens) // BLOCK_SIZE) - self._blocks[seq_id]
            blocks = list(range(self.next_block, self.next_block + max(0, num_missing)))
            self.next_block += len(blocks)
            self._blocks[seq_id] += len(blocks)
            is_sampled = start + num_tokens == self._lengths[seq_id]
            scheduled.append(
                ScheduledSequence(seq_id, start, num_tokens, unsent, blocks, is_sampled)
            )
        self.num_steps += 1
        step = StepInput(self.num_steps, list(released), list(new), scheduled)
        output = self.runner.execute(step, {})
        for token in output.tokens if output is not None else ():
            self.tokens.setdefault(token.seq_id, []).append(token)
            self._unsent[token.seq_id].append(token.token_id)
        return output


def _answer(runner: ModelRunner, params: SamplingParams, num_tokens: int) -> list[SampledToken]:
    """One sequence alone, its prompt in one chunk."""
    driver = _Driver(runner)
    driver.step([(1, 0, len(PROMPT))], new=[NewSequence(1, PROMPT, len(PROMPT), params)])
    for position in range(len(PROMPT), len(PROMPT) + num_tokens - 1):
        driver.step([(1, position, 1)])
    driver.step([], released=[1])
    return driver.tokens[1]


def _told(runner: ModelRunner, token_ids: list[int]) -> list[SampledToken]:
    """As `_answer` with greedy sampling, each next token told instead of sampled here, so that
    every rank runs the same steps."""
    found: list[SampledToken] = []
    first = ScheduledSequence(1, 0, len(PROMPT), [], list(range(6)), True)
    new = NewSequence(1, PROMPT, len(PROMPT), GREEDY)
    steps = [StepInput(0, [], [new], [first])]
    for position, token_id in enumerate(token_ids, start=len(PROMPT)):
        one = ScheduledSequence(1, position, 1, [token_id], [], True)
        steps.append(StepInput(position, [], [], [one]))
    for step in steps:
        output = runner.execute(step, {})
        found.extend(output.tokens if output is not None else ())
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_64_greedy_tokens_equal_transformers_at_every_size(checkpoint: Path, size: int):
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

    def run(rank: Collectives) -> list[SampledToken]:
        return _told(_load(checkpoint, rank), expected[:-1])

    answers = run_ranks(size, run)
    assert [token.token_id for token in answers[0]] == expected
    assert answers[1:] == [[]] * (size - 1)


def test_padded_ids_are_never_sampled(checkpoint: Path):
    params = SamplingParams(seed=1, max_tokens=60, temperature=100.0)
    runner = _load(checkpoint, SingleRank(), num_real_tokens=20)
    ids = {token.token_id for token in _answer(runner, params, 60)}
    assert max(ids) < 20
    assert len(ids) > 5


def _run_in_company(runner: ModelRunner) -> _Driver:
    """Sequences 1 (greedy) and 2 (seeded) among 14 others, prompts in chunks, joined late."""
    driver = _Driver(runner)
    others = [
        NewSequence(10 + i, [(i * 31 + k) % 140 for k in range(3 + 2 * i)], 3 + 2 * i, SEEDED)
        for i in range(14)
    ]
    own = [NewSequence(seq_id, PROMPT, len(PROMPT), p) for seq_id, p in ((1, GREEDY), (2, SEEDED))]
    driver.step([(other.seq_id, 0, len(other.token_ids)) for other in others], new=others)
    at = {other.seq_id: len(other.token_ids) for other in others}
    driver.step([(1, 0, 7), *((s, p, 1) for s, p in at.items()), (2, 0, 16)], new=own)
    driver.step([(2, 16, len(PROMPT) - 16), (1, 7, len(PROMPT) - 7)])
    at = {s: p + 1 for s, p in at.items()}
    for position in range(len(PROMPT), len(PROMPT) + 39):
        company = [(s, p, 1) for s, p in at.items()] if position % 3 else []
        at = {s: p + bool(company) for s, p in at.items()}
        driver.step([*company[:5], (2, position, 1), *company[5:], (1, position, 1)])
    return driver


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_in_a_batch_of_sixteen_are_those_alone_logprobs_included(
    checkpoint: Path, dtype: str
):
    options = {"dtype": dtype, "kv_cache_tokens": 200 * BLOCK_SIZE}
    driver = _run_in_company(_load(checkpoint, SingleRank(), **options))
    runner = _load(checkpoint, SingleRank(), **options)
    assert driver.tokens[1] == _answer(runner, GREEDY, 40)
    assert driver.tokens[2] == [_renamed(token, 2) for token in _answer(runner, SEEDED, 40)]


def _renamed(token: SampledToken, seq_id: int) -> SampledToken:
    return SampledToken(seq_id, token.token_id, token.logprobs, token.error)


def test_a_preempted_sequence_resumes_with_the_same_tokens(checkpoint: Path):
    runner = _load(checkpoint, SingleRank())
    alone = _answer(runner, SEEDED, 40)
    driver = _Driver(runner)
    driver.step([(2, 0, len(PROMPT))], new=[NewSequence(2, PROMPT, len(PROMPT), SEEDED)])
    for position in range(len(PROMPT), len(PROMPT) + 12):
        driver.step([(2, position, 1)])
    so_far = PROMPT + [token.token_id for token in driver.tokens[2]]
    driver.step([], released=[2])
    resumed = NewSequence(2, so_far, len(PROMPT), SEEDED)
    driver.step([(2, 0, 9)], new=[resumed])
    driver.step([(2, 9, len(so_far) - 9)])
    for position in range(len(so_far), len(PROMPT) + 39):
        driver.step([(2, position, 1)])
    assert driver.tokens[2] == [_renamed(token, 2) for token in alone]


def test_a_mask_restricts_the_choice(checkpoint: Path):
    runner = _load(checkpoint, SingleRank())
    mask = np.zeros(5, np.uint32)
    mask[77 // 32] = 1 << (77 % 32)
    part = ScheduledSequence(1, 0, len(PROMPT), [], [0, 1], True)
    step = StepInput(0, [], [NewSequence(1, PROMPT, len(PROMPT), SEEDED)], [part])
    output = runner.execute(step, {1: mask})
    assert output is not None
    assert output.tokens[0].token_id == 77


def test_a_step_that_samples_nothing_has_no_tokens(checkpoint: Path):
    driver = _Driver(_load(checkpoint, SingleRank()))
    output = driver.step([(1, 0, 5)], new=[NewSequence(1, PROMPT, len(PROMPT), GREEDY)])
    assert output == StepOutput(1, [])
    assert driver.step([], released=[1]) == StepOutput(2, [])


def test_the_pool_is_cut_into_whole_blocks_the_same_on_every_rank(checkpoint: Path):
    runner = _load(checkpoint, SingleRank(), kv_cache_tokens=10 * BLOCK_SIZE + 15)
    assert runner.num_total_blocks == 10
    sizes = run_ranks(2, lambda r: _load(checkpoint, r, kv_cache_tokens=None).num_total_blocks)
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
def test_options_that_do_not_fit_the_checkpoint_are_refused(checkpoint, options, error, reason):
    with pytest.raises(error, match=reason):
        _load(checkpoint, SingleRank(), **options)


def test_an_illegal_size_is_refused_on_every_rank(checkpoint: Path):
    with pytest.raises(ConfigurationError, match="must be one of 1, 2, 4, 8, got 3"):
        run_ranks(3, lambda rank: _load(checkpoint, rank))


def test_a_dead_rank_fails_the_step(checkpoint: Path):
    ranks = connected_ranks(2)
    other = ranks[1]

    def fail_when_loaded(rank: Collectives) -> None:
        _load(checkpoint, rank)
        rank.close()

    runner = _load(checkpoint, ranks[0])
    fail_when_loaded(other)
    with pytest.raises(CollectiveError, match="rank 1 is gone"):
        _answer(runner, GREEDY, 2)
