"""What is kept by slot is what each sequence's tokens and parameters say, computed anew."""

from __future__ import annotations

import ctypes
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from serve.kernels.native_sampling import SAMPLING_DTYPE
from serve.messages import NewSequence, SamplingParams, StepInput
from serve.runner.sampling_table import SamplingTable
from serve.seeds import uniform

NUM_IDS = 40
EOS = (38, 45)  # one of them is padding
SLOTS = range(4)

ids = st.integers(0, 49)  # padding too
params = st.builds(
    SamplingParams,
    seed=st.integers(-(2**63), 2**63 - 1),
    max_tokens=st.just(99),
    temperature=st.sampled_from([0.0, 1e-6, 0.5, 1.0]),
    top_p=st.sampled_from([0.5, 1.0]),
    top_k=st.sampled_from([0, 7, 2**40]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    presence_penalty=st.sampled_from([0.0, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.25]),
    logit_bias=st.dictionaries(ids, st.sampled_from([-2.0, 3.5]), max_size=3),
    min_tokens=st.integers(0, 4),
    stop_token_ids=st.lists(ids, max_size=2).map(tuple),
    logprobs=st.sampled_from([None, 0, 3]),
)


@dataclass
class _Sequence:
    params: SamplingParams
    prompt: list[int]
    output: list[int] = field(default_factory=list)


class TableMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.table = SamplingTable(max_slots=len(SLOTS), num_ids=NUM_IDS, eos_token_ids=EOS)
        self.running: dict[int, _Sequence] = {}

    @rule(
        slot=st.sampled_from(SLOTS),
        params=params,
        prompt=st.lists(ids, min_size=1, max_size=30),
        output=st.lists(ids, max_size=30),
    )
    def replace(
        self, slot: int, params: SamplingParams, prompt: list[int], output: list[int]
    ) -> None:
        released = [slot] if slot in self.running else []
        new = NewSequence(slot, [*prompt, *output], len(prompt), params, [])
        self.table.advance(StepInput(0, released, [new], [], b"", b"", []))
        self.running[slot] = _Sequence(params, prompt, list(output))

    @rule(slot=st.sampled_from(SLOTS))
    def release(self, slot: int) -> None:
        if self.running.pop(slot, None) is not None:
            self.table.advance(StepInput(0, [slot], [], [], b"", b"", []))

    @rule(order=st.permutations(SLOTS), token_ids=st.lists(ids, min_size=4, max_size=4))
    def decode(self, order: list[int], token_ids: list[int]) -> None:
        slots = np.array([slot for slot in order if slot in self.running], np.int32)
        tokens = np.array(token_ids[: len(slots)], np.int64)
        self.table.advance(StepInput(0, [], [], [], slots.tobytes(), b"", []))
        self.table.count(slots, tokens)
        for slot, token_id in zip(slots.tolist(), tokens.tolist(), strict=True):
            self.running[slot].output.append(token_id)

    @invariant()
    def rows_are_those_computed_anew(self) -> None:
        slots = sorted(self.running, reverse=True)
        rows = self.table.rows(np.array(slots, np.int32), {})
        assert rows.dtype == SAMPLING_DTYPE
        for row, slot in zip(rows, slots, strict=True):
            assert _read(row) == _expected(self.running[slot])


def _real(token_ids: Any) -> set[int]:
    return {token_id for token_id in token_ids if token_id < NUM_IDS}


def _expected(sequence: _Sequence) -> dict[str, Any]:
    params, output = sequence.params, sequence.output
    is_penalized = (
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
    ) != (1.0, 0.0, 0.0)
    is_held_back = len(output) < params.min_tokens
    counts = {i: n for i, n in Counter(output).items() if i < NUM_IDS}
    return {
        "temperature": params.temperature if params.temperature >= 1e-5 else 0.0,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "top_k": min(params.top_k, 2**31 - 1),
        "num_logprobs": -1 if params.logprobs is None else params.logprobs,
        "number": uniform(params.seed, len(output)),
        "mask": 0,
        "prompt": _real(sequence.prompt) if is_penalized else set(),
        "output": counts if is_penalized else {},
        "biases": {i: bias for i, bias in params.logit_bias.items() if i < NUM_IDS},
        "held_back": _real((*EOS, *params.stop_token_ids)) if is_held_back else set(),
    }


def _read(row: np.void) -> dict[str, Any]:
    """The row as C would see it, its lists read through their addresses."""

    def at(address: str, num: str, kind: Any = ctypes.c_int32) -> list[Any]:
        size = int(row[num])
        return list((kind * size).from_address(int(row[address]))) if size else []

    scalars = {name: row[name].item() for name in SAMPLING_DTYPE.names[:10]}
    lists = {
        "prompt": at("prompt_ids", "num_prompt_ids"),
        "held_back": at("held_back_ids", "num_held_back_ids"),
    }
    output_ids, counts = at("output_ids", "num_output_ids"), at("output_counts", "num_output_ids")
    bias_ids, biases = at("bias_ids", "num_biases"), at("biases", "num_biases", ctypes.c_float)
    for listed in (*lists.values(), output_ids, bias_ids):
        assert len(set(listed)) == len(listed), "ids must be distinct"
    return {
        **scalars,
        **{name: set(listed) for name, listed in lists.items()},
        "output": dict(zip(output_ids, counts, strict=True)),
        "biases": dict(zip(bias_ids, biases, strict=True)),
    }


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


def test_a_mask_stands_in_its_slots_row_and_lifts_min_tokens() -> None:
    table = SamplingTable(max_slots=3, num_ids=NUM_IDS, eos_token_ids=EOS)
    params = SamplingParams(seed=1, max_tokens=9, min_tokens=5)
    new = [NewSequence(slot, [1], 1, params, []) for slot in SLOTS[:3]]
    table.advance(StepInput(0, [], new, [], b"", b"", []))
    mask = np.ones(2, np.uint32)
    rows = table.rows(np.array([2, 0], np.int32), {0: mask})
    assert rows["mask"].tolist() == [0, mask.ctypes.data]
    assert rows["num_held_back_ids"].tolist() == [1, 0]


@pytest.mark.parametrize("num_tokens", [15, 16, 17, 300])
def test_counts_outgrow_their_first_memory(num_tokens: int) -> None:
    table = SamplingTable(max_slots=1, num_ids=1000, eos_token_ids=())
    params = SamplingParams(seed=1, max_tokens=999, frequency_penalty=1.0)
    table.advance(StepInput(0, [], [NewSequence(0, [1], 1, params, [])], [], b"", b"", []))
    slot = np.zeros(1, np.int32)
    for token_id in range(num_tokens):
        table.advance(StepInput(0, [], [], [], slot.tobytes(), b"", []))
        table.count(slot, np.array([token_id]))
    read = _read(table.rows(slot, {})[0])
    assert read["output"] == dict.fromkeys(range(num_tokens), 1)
