"""The sampler against a slow twin, against its neighbours, and against the odds."""

import math
from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.messages import SamplingParams
from serve.runner.sampler import Sample, Sampler, SamplingRow
from serve.seeds import choice_seed, uniform, uniforms

EOS = 3


def make_row(
    *,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    mask: np.ndarray | None = None,
    **fields: Any,
) -> SamplingRow:
    params = SamplingParams(**{"seed": 0, "max_tokens": 9, **fields})
    return SamplingRow(params, prompt or [], output or [], mask)


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sample_one(logits: list[float] | np.ndarray, row: SamplingRow) -> Sample:
    matrix = np.array(logits, np.float32)[None]
    sampler = Sampler(
        vocab_size=matrix.shape[1], num_real_tokens=matrix.shape[1], eos_token_ids=(EOS,)
    )
    [token] = sampler.sample(matrix, [row])
    return token


def adjusted(logits: np.ndarray, row: SamplingRow) -> np.ndarray:
    p = row.sampling
    scores = logits.astype(np.float64)
    for i in {*row.prompt_token_ids, *row.output_token_ids}:
        factor = p.repetition_penalty
        scores[i] = scores[i] / factor if scores[i] > 0 else scores[i] * factor
    for i, count in Counter(row.output_token_ids).items():
        scores[i] -= p.presence_penalty + count * p.frequency_penalty
    for i, bias in p.logit_bias.items():
        scores[i] += bias
    if len(row.output_token_ids) < p.min_tokens:
        scores[[EOS, *p.stop_token_ids]] = -math.inf
    return scores


def accepted(logits: np.ndarray, row: SamplingRow) -> set[int]:
    """The definition in float64, everything sorted: adjust, filter, walk the sum.

    Answers within float32's rounding of the number and of top_p are accepted too.
    """
    p = row.sampling
    scores = adjusted(logits, row)
    order = np.lexsort((np.arange(len(scores)), -scores))
    if p.temperature == 0:
        return {int(order[0])}
    order = order[: p.top_k or None]
    weights = np.exp((scores[order] - scores[order[0]]) / p.temperature)
    passed = weights.cumsum()
    number = uniform(p.seed, len(row.output_token_ids))
    token_ids = set()
    for top_p, shift in product((p.top_p - 1e-5, p.top_p, p.top_p + 1e-5), (-1e-5, 0, 1e-5)):
        is_kept = weights >= p.min_p
        if p.top_p < 1.0:
            is_kept &= passed - weights < top_p * passed[-1]
        kept = order[is_kept]
        target = max(number + shift, 0.0) * passed[len(kept) - 1]
        place = int((passed[: len(kept)] <= target).sum())
        token_ids.add(int(kept[min(place, len(kept) - 1)]))
    return token_ids


ids = st.integers(0, 39)
params = st.fixed_dictionaries(
    {
        "seed": st.integers(-(2**63), 2**63 - 1),
        "temperature": st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.0]),
        "top_p": st.sampled_from([1.0, 0.9, 0.5, 0.05]),
        "top_k": st.sampled_from([0, 1, 3, 20, 1000]),
        "min_p": st.sampled_from([0.0, 0.03, 0.31]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
        "presence_penalty": st.sampled_from([0.0, 0.7, -1.1]),
        "frequency_penalty": st.sampled_from([0.0, 0.45, -0.3]),
        "logit_bias": st.dictionaries(ids, st.sampled_from([-100.0, -1.3, 2.1, 100.0]), max_size=3),
        "min_tokens": st.integers(0, 6),
        "stop_token_ids": st.lists(ids, max_size=2).map(tuple),
    }
)
token_lists = st.lists(ids, max_size=8)


@settings(max_examples=300, deadline=None)
@given(
    quarters=st.lists(st.integers(-12, 12), min_size=40, max_size=90),
    params=params,
    prompt=token_lists,
    output=token_lists,
)
def test_token_is_the_slow_twins(
    quarters: list[int], params: dict[str, Any], prompt: list[int], output: list[int]
) -> None:
    logits = np.array(quarters, dtype=np.float32) / 4  # many ties
    row = make_row(prompt=prompt, output=output, **params)

    assert sample_one(logits, row).token_id in accepted(logits, row)


@pytest.mark.parametrize(
    "fields",
    [{}, {"top_p": 0.97}, {"top_k": 5000}, {"min_p": 1e-4}, {"min_p": 0.2, "top_p": 0.99}],
    ids=str,
)
@pytest.mark.parametrize("spread", [0.0, 0.01, 3.0])
def test_flat_distribution_over_many_ids_is_sampled_whole(
    fields: dict[str, Any], spread: float
) -> None:
    generator = np.random.default_rng(7)
    logits = (generator.normal(size=20_000) * spread).astype(np.float32)
    for seed in range(3):
        row = make_row(seed=seed, **fields)

        assert sample_one(logits, row).token_id in accepted(logits, row)


@settings(max_examples=25, deadline=None)
@given(
    data=st.lists(params, min_size=16, max_size=16),
    seed=st.integers(0, 2**32 - 1),
    digits=st.sampled_from([1, 6]),
    order=st.permutations(range(16)),
)
def test_row_has_the_same_bits_alone_and_in_any_batch(
    data: list[dict[str, Any]], seed: int, digits: int, order: list[int]
) -> None:
    vocab_size = 1733
    logits = normal(16, vocab_size, seed=seed).round(digits)
    sampler = Sampler(vocab_size=vocab_size, num_real_tokens=1700, eos_token_ids=(EOS,))
    rows = [
        make_row(prompt=[i, 5], output=list(range(i)), logprobs=3, **fields)
        for i, fields in enumerate(data)
    ]

    together = sampler.sample(logits, rows)
    shuffled = sampler.sample(logits[order], [rows[i] for i in order])
    alone = [sampler.sample(logits[i : i + 1], [rows[i]])[0] for i in range(16)]
    assert together == alone
    assert [together[i] for i in order] == shuffled


def test_logits_are_left_as_they_were() -> None:
    logits = normal(2, 64, seed=0)
    before = logits.copy()
    sampler = Sampler(vocab_size=64, num_real_tokens=60, eos_token_ids=(EOS,))
    rows = [make_row(output=[1, 2], presence_penalty=1.0, min_tokens=5) for i in range(2)]
    sampler.sample(logits, rows)

    assert np.array_equal(logits, before)


@pytest.mark.parametrize(
    ("fields", "odds"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"top_k": 3}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),
        ({"min_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_right_odds(fields: dict[str, Any], odds: list[float]) -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    num_draws = 6000
    sampler = Sampler(vocab_size=4, num_real_tokens=4, eos_token_ids=())
    matrix = logits[None].astype(np.float32)
    rows = (
        make_row(seed=seed // 80, output=[0] * (seed % 80), **fields) for seed in range(num_draws)
    )
    counts = Counter(sampler.sample(matrix, [row])[0].token_id for row in rows)

    assert all(counts[i] == 0 for i, share in enumerate(odds) if share == 0)
    expected = [(counts[i], share * num_draws) for i, share in enumerate(odds) if share > 0]
    chi_square = sum((seen - mean) ** 2 / mean for seen, mean in expected)
    assert chi_square < 16.3  # 0.1 % of fair samplers are above it with three degrees of freedom


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    assert sample_one([0.0, 2.0, 1.0, 2.0], make_row(temperature=0.0)).token_id == 1


def test_padded_ids_are_never_sampled() -> None:
    logits = np.array([[0.0, 0.1, 50.0, 60.0]], np.float32)
    sampler = Sampler(vocab_size=4, num_real_tokens=2, eos_token_ids=())
    for seed in range(20):
        for temperature in (0.0, 5.0):
            row = make_row(seed=seed, temperature=temperature, logprobs=4, logit_bias={3: 100.0})
            [token] = sampler.sample(logits, [row])

            assert token.token_id < 2
            assert token.logprobs is not None
            assert set(token.logprobs.top_ids) == {0, 1}


def test_mask_allows_only_its_ids() -> None:
    mask = np.zeros(3, dtype=np.uint32)
    for token_id in (2, 33, 70):
        mask[token_id // 32] |= np.uint32(1 << token_id % 32)
    logits = normal(80, seed=1)
    sampled = {
        sample_one(logits, make_row(seed=seed, temperature=9.0, mask=mask)).token_id
        for seed in range(60)
    }

    assert sampled == {2, 33, 70}


def test_grammar_may_end_before_min_tokens() -> None:
    mask = np.array([1 << EOS], dtype=np.uint32)

    assert sample_one([0.0] * 8, make_row(min_tokens=5, mask=mask)).token_id == EOS


def test_end_is_held_back_until_min_tokens() -> None:
    logits = [0.0] * 8
    logits[EOS], logits[5], logits[6] = 9.0, 8.0, 1.0
    fields: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (5,)}

    assert sample_one(logits, make_row(output=[1], **fields)).token_id == 6
    assert sample_one(logits, make_row(output=[1, 1], **fields)).token_id == EOS


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_that_is_not_finite_fails_alone(bad: float, temperature: float) -> None:
    logits = normal(3, 50, seed=2)
    sampler = Sampler(vocab_size=50, num_real_tokens=50, eos_token_ids=(EOS,))
    rows = [make_row(seed=i, temperature=temperature, logprobs=2) for i in range(3)]
    healthy = sampler.sample(logits, rows)
    logits[1, 17] = bad
    tokens = sampler.sample(logits, rows)

    assert tokens[1].error is not None
    assert [tokens[0], tokens[2]] == [healthy[0], healthy[2]]


def test_logprobs_are_the_models_own() -> None:
    logits = normal(50, seed=3)
    row = make_row(
        prompt=[1, 2], output=[3], temperature=0.2, repetition_penalty=1.5, logprobs=4, top_k=2
    )
    token = sample_one(logits, row)
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum())

    assert token.logprobs is not None
    assert token.logprobs.logprob == pytest.approx(expected[token.token_id], abs=1e-5)
    best = np.argsort(-expected)[:4]
    assert token.logprobs.top_ids == best.tolist()
    assert token.logprobs.top_logprobs == pytest.approx(expected[best].tolist(), abs=1e-5)


def test_logprobs_of_zero_alternatives_hold_the_token_alone() -> None:
    token = sample_one([0.0] * 4, make_row(logprobs=0))

    assert token.logprobs is not None
    assert token.logprobs.logprob == pytest.approx(-math.log(4))
    assert token.logprobs.top_ids == []


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e-4])
def test_tiny_temperature_is_greedy_and_finite(temperature: float) -> None:
    assert sample_one([-3e38, 1.0, 3.0, 2.0], make_row(temperature=temperature)).token_id == 2


def test_uniform_numbers_are_spread_and_pinned() -> None:
    numbers = [uniform(seed, position) for seed in range(50) for position in range(200)]

    assert len(set(numbers)) == 10_000
    assert all(0 <= number < 1 for number in numbers)
    tenths = Counter(int(number * 10) for number in numbers)
    assert all(abs(count - 1000) < 120 for count in tenths.values())
    neighbours = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
    assert abs(neighbours) < 0.04


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    positions=st.lists(st.integers(0, 2**31), min_size=1, max_size=4),
)
def test_many_uniform_numbers_have_the_bits_of_each(seed: int, positions: list[int]) -> None:
    seeds = np.full(len(positions), seed % 2**64, np.uint64)

    assert uniforms(seeds, np.array(positions)).tolist() == [uniform(seed, p) for p in positions]


def test_choice_seeds_differ_and_fit_a_message() -> None:
    seeds = {choice_seed(seed, choice) for seed in range(-20, 20) for choice in range(16)}

    assert len(seeds) == 640
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert choice_seed(2**63, 0) != choice_seed(-(2**63) + 1, 0)
