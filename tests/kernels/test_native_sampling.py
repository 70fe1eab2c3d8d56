"""Native sampling against a float64 oracle, against the reference, and against its neighbours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.kernels.native import NativeLibrary
from serve.kernels.native_sampling import (
    NOT_FINITE,
    NOTHING_ALLOWED,
    SAMPLING_DTYPE,
    NativeSamples,
    sample,
)
from serve.messages import SamplingParams
from serve.runner.sampler import Sampler, SamplingRow
from serve.seeds import uniform

NUM_REAL_IDS = 151_665
CLEAR = 2e-5  # of the sum: float32 and the oracle agree on everything wider


@dataclass
class Row:
    """How a row is sampled, with the arrays that its record points to."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    number: float = 0.5
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    num_logprobs: int = -1
    prompt_ids: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    biases: dict[int, float] = field(default_factory=dict)
    held_back_ids: list[int] = field(default_factory=list)
    allowed: set[int] | None = None

    def arrays(self, num_ids: int) -> dict[str, np.ndarray]:
        output_ids, counts = np.unique(self.output_ids, return_counts=True)
        arrays = {
            "prompt_ids": np.unique(self.prompt_ids).astype(np.int32),
            "output_ids": output_ids.astype(np.int32),
            "output_counts": counts.astype(np.int32),
            "bias_ids": np.array(list(self.biases), np.int32),
            "biases": np.array(list(self.biases.values()), np.float32),
            "held_back_ids": np.array(self.held_back_ids, np.int32),
        }
        if self.allowed is not None:
            arrays["mask"] = mask_of(self.allowed, num_ids)
        return arrays


def mask_of(allowed: set[int], num_ids: int) -> np.ndarray:
    bits = np.zeros(-(-num_ids // 32) * 32, np.uint8)
    bits[num_ids:] = 1  # a mask may say anything of ids that do not exist
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def run(
    library: NativeLibrary,
    logits: np.ndarray,
    rows: list[Row],
    *,
    num_ids: int | None = None,
    num_threads: int = 1,
) -> NativeSamples:
    num_ids = logits.shape[1] if num_ids is None else num_ids
    records = np.zeros(len(rows), SAMPLING_DTYPE)
    kept = [row.arrays(num_ids) for row in rows]
    for record, row, arrays in zip(records, rows, kept, strict=True):
        for name in SAMPLING_DTYPE.names or ():
            if hasattr(row, name) and name not in arrays:
                record[name] = getattr(row, name)
        for name, array in arrays.items():
            record[name] = array.ctypes.data if array.size else 0
        record["num_prompt_ids"] = len(arrays["prompt_ids"])
        record["num_output_ids"] = len(arrays["output_ids"])
        record["num_biases"] = len(arrays["biases"])
        record["num_held_back_ids"] = len(arrays["held_back_ids"])
    return sample(library.pool(num_threads), logits, records, num_ids=num_ids)


def run_one(library: NativeLibrary, logits: np.ndarray, row: Row, **options: Any) -> int:
    found = run(library, logits[None], [row], **options)
    assert found.errors.tolist() == [0]
    return int(found.token_ids[0])


class Oracle:
    """The definition: float32 scores as they are, everything else in float64 and sorted."""

    def __init__(self, logits: np.ndarray, row: Row) -> None:
        self.scores = adjusted(logits, row)
        order = np.lexsort((np.arange(len(logits)), -self.scores))
        order = order[np.isfinite(self.scores[order])]
        self.order = order[: row.top_k or None]
        best_first = self.scores[self.order].astype(np.float64)
        self.weights = np.exp((best_first - best_first[0]) / np.float32(row.temperature))
        self.shares = self.weights / self.weights.sum()

    def cut(self, num_kept: int) -> None:
        self.order, self.shares = self.order[:num_kept], self.shares[:num_kept]

    def clear_draws(self, most: int = 12) -> list[tuple[float, int]]:
        """Numbers in the middle of an id's share, with that id, spread over the distribution."""
        shares = self.shares / self.shares.sum()
        middles = shares.cumsum() - shares / 2
        clear = np.flatnonzero(shares > CLEAR)
        chosen = clear[np.unique(np.linspace(0, len(clear) - 1, most).astype(int))]
        return [(float(middles[i]), int(self.order[i])) for i in chosen]


def adjusted(logits: np.ndarray, row: Row) -> np.ndarray:
    scores = logits.astype(np.float32).copy()
    for i in {*row.prompt_ids, *row.output_ids}:
        factor = np.float32(row.repetition_penalty)
        scores[i] = scores[i] / factor if scores[i] > 0 else scores[i] * factor
    for i in set(row.output_ids):
        frequency = np.float32(row.output_ids.count(i)) * np.float32(row.frequency_penalty)
        scores[i] -= frequency + np.float32(row.presence_penalty)
    for i, bias in row.biases.items():
        scores[i] += np.float32(bias)
    if row.allowed is not None:
        scores[[i for i in range(len(scores)) if i not in row.allowed]] = -np.inf
    scores[row.held_back_ids] = -np.inf
    return scores


@st.composite
def distributions(draw: st.DrawFn) -> tuple[np.ndarray, Row]:
    num_ids = draw(st.sampled_from([1, 2, 31, 63, 64, 65, 90, 700, 5000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0.0, 0.05, 1.0, 4.0]))
    logits = (rng.standard_normal(num_ids) * spread).astype(np.float32)
    if draw(st.booleans()):
        logits = np.round(logits * 4) / 4  # many ties
    ids = st.integers(0, num_ids - 1)
    row = Row(
        temperature=draw(st.sampled_from([0.3, 0.7, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 3, 20, 300, 10_000])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.8])),
        presence_penalty=draw(st.sampled_from([0.0, 0.75, -1.1])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.45, -0.3])),
        prompt_ids=draw(st.lists(ids, max_size=8)),
        output_ids=draw(st.lists(ids, max_size=8)),
        biases=draw(st.dictionaries(ids, st.sampled_from([-100.0, -1.3, 2.1]), max_size=3)),
    )
    if draw(st.booleans()):
        row.allowed = {int(i) for i in np.flatnonzero(rng.random(num_ids) < rng.random() ** 3)}
        row.allowed.add(draw(ids))
    elif num_ids > 4:
        row.held_back_ids = draw(st.lists(ids, max_size=2, unique=True))
    return logits, row


@settings(max_examples=120, deadline=None)
@given(distribution=distributions(), cut_at=st.floats(0, 1), cut=st.sampled_from(["", "p", "m"]))
def test_a_draw_gives_the_id_whose_share_it_falls_into(library, distribution, cut_at, cut):
    logits, row = distribution
    oracle = Oracle(logits, row)
    shares, weights = oracle.shares, oracle.weights
    last = int(cut_at * (len(shares) - 1))
    if cut == "p" and shares[last] > CLEAR:
        row.top_p = float(shares[:last].sum() + shares[last] / 2)
        oracle.cut(last + 1)
    if cut == "m" and weights[last] > 1.001 * weights[min(last + 1, len(weights) - 1)]:
        row.min_p = float(np.sqrt(weights[last] * weights[last + 1]))
        oracle.cut(last + 1)

    draws = oracle.clear_draws()
    rows = [Row(**{**vars(row), "number": number}) for number, _ in draws]
    found = run(library, np.repeat(logits[None], len(rows), axis=0), rows)

    assert found.errors.tolist() == [0] * len(rows)
    assert found.token_ids.tolist() == [token_id for _, token_id in draws]


@settings(max_examples=40, deadline=None)
@given(distribution=distributions())
def test_temperature_0_takes_the_first_of_the_best(library, distribution):
    logits, row = distribution
    row.temperature = 0.0
    assert run_one(library, logits, row) == int(adjusted(logits, row).argmax())


PARAMS = [
    {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1},
    {"temperature": 1.0},
    {"temperature": 2.0},
    {"temperature": 1.5, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.02, "presence_penalty": 1.5, "frequency_penalty": 0.2},
    {"temperature": 0.0, "logit_bias": {11: 5.0, 50_000: -100.0}},
]


@pytest.mark.parametrize("fields", PARAMS, ids=str)
def test_a_whole_vocabulary_gives_the_references_tokens_and_logprobs(library, fields):
    rng = np.random.default_rng(7)
    num_rows, num_top = 6, 4
    logits = (rng.standard_normal((num_rows, 151_936)) * 3).astype(np.float32)
    logits[:, NUM_REAL_IDS:] = 1e9  # padding, never looked at
    prompt, output = rng.integers(0, NUM_REAL_IDS, (2, 300)).tolist()
    sequences = [
        SamplingRow(
            SamplingParams(seed=i, max_tokens=9, logprobs=num_top, **fields), prompt, output
        )
        for i in range(num_rows)
    ]
    reference = Sampler(vocab_size=151_936, num_real_tokens=NUM_REAL_IDS, eos_token_ids=(151_645,))
    options = {"biases" if name == "logit_bias" else name: v for name, v in fields.items()}
    rows = [
        Row(
            number=uniform(i, len(output)),
            num_logprobs=num_top,
            prompt_ids=prompt,
            output_ids=output,
            **options,
        )
        for i in range(num_rows)
    ]

    expected = reference.sample(logits, sequences)
    found = run(library, logits, rows, num_ids=NUM_REAL_IDS, num_threads=2)

    assert found.token_ids.tolist() == [one.token_id for one in expected]
    logprobs = [one.logprobs for one in expected if one.logprobs]
    assert found.top_ids.tolist() == [one.top_ids for one in logprobs]
    np.testing.assert_allclose(found.logprobs, [one.logprob for one in logprobs], atol=1e-5)
    np.testing.assert_allclose(
        found.top_logprobs, [one.top_logprobs for one in logprobs], atol=1e-5
    )


def test_a_rows_result_knows_neither_its_neighbours_nor_the_threads(library):
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((9, 3000)).astype(np.float32)
    before = logits.copy()
    kinds = [
        Row(num_logprobs=3),
        Row(temperature=0.0, prompt_ids=[5, 80], repetition_penalty=2.0),
        Row(top_p=0.6, allowed=set(range(100, 900)), num_logprobs=0),
    ]
    rows = [Row(**{**vars(kinds[i % 3]), "number": i / 9}) for i in range(9)]

    def bits(found: NativeSamples, row: int) -> list[bytes]:
        num_top = max(rows[row].num_logprobs, 0)
        parts = [found.token_ids[row], found.top_ids[row, :num_top]]
        if rows[row].num_logprobs >= 0:
            parts += [found.logprobs[row], found.top_logprobs[row, :num_top]]
        return [part.tobytes() for part in parts]

    wide = np.full((9, 4000), np.nan, np.float32)  # further apart, other alignment
    wide[:, 1:3001] = logits
    together = run(library, logits, rows)
    for others in (
        run(library, logits, rows, num_threads=3),
        run(library, wide[:, 1:], rows, num_ids=3000),
    ):
        assert [bits(others, i) for i in range(9)] == [bits(together, i) for i in range(9)]
    for i in range(9):
        alone = run(library, logits[i : i + 1], [rows[i]])
        assert alone.token_ids[0] == together.token_ids[i]
    assert logits.tobytes() == before.tobytes()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_an_error_and_leaves_the_others_alone(library, temperature):
    logits = np.random.default_rng(0).standard_normal((6, 500)).astype(np.float32)
    rows = [Row(temperature=temperature, num_logprobs=2) for _ in range(6)]
    rows[4].prompt_ids, rows[4].repetition_penalty = [499], 1.5
    expected = run(library, logits, rows)
    logits[1, 0] = np.nan
    logits[2, 63] = np.inf
    logits[3] = -np.inf
    logits[4, 499] = np.nan
    found = run(library, logits, rows)
    assert found.errors.tolist() == [0, NOT_FINITE, NOT_FINITE, NOT_FINITE, NOT_FINITE, 0]
    assert found.token_ids[[0, 5]].tolist() == expected.token_ids[[0, 5]].tolist()
    assert found.logprobs[[0, 5]].tobytes() == expected.logprobs[[0, 5]].tobytes()


@pytest.mark.parametrize("num_ids", [1, 40, 64, 100, 1000])
def test_where_nothing_is_allowed_is_an_error(library, num_ids):
    logits = np.zeros((3, num_ids), np.float32)
    rows = [
        Row(allowed=set()),
        Row(held_back_ids=list(range(num_ids))),
        Row(held_back_ids=[-1, num_ids], biases={num_ids: 1.0}, output_ids=[num_ids + 1]),
    ]
    assert run(library, logits, rows).errors.tolist() == [NOTHING_ALLOWED, NOTHING_ALLOWED, 0]


def test_minus_infinity_is_a_logit_like_others_and_never_drawn(library):
    logits = np.full(300, -np.inf, np.float32)
    logits[[7, 250]] = 1.0, 1.0
    row = Row(num_logprobs=4, number=0.75)
    found = run(library, logits[None], [row])
    assert found.token_ids.tolist() == [250]
    assert found.top_ids.tolist() == [[7, 250, -1, -1]]  # there are no more
    np.testing.assert_allclose(found.logprobs, [-np.log(2)], rtol=1e-6)
    assert run_one(library, logits, Row(number=0.25)) == 7
    assert run_one(library, logits, Row(temperature=0, allowed={250})) == 250


def test_logprobs_are_those_of_the_logits_before_masks_and_penalties(library):
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    row = Row(
        temperature=0.0,
        allowed={2, 3},
        biases={3: 1.0},
        prompt_ids=[0],
        repetition_penalty=9.0,
        num_logprobs=2,
    )
    found = run(library, logits[None], [row])
    assert found.token_ids.tolist() == [3]
    assert found.top_ids.tolist() == [[0, 1]]
    np.testing.assert_allclose(found.logprobs, np.log([0.125]), rtol=1e-6)
    np.testing.assert_allclose(found.top_logprobs, np.log([[0.5, 0.25]]), rtol=1e-6)
