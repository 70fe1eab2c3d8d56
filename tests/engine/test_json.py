"""JSON through the whole engine: random logits, the real sampler, a real byte-level vocabulary."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from serve.engine.engine import Engine
from serve.engine.grammar import GrammarCompiler
from serve.messages import GenerateRequest, GrammarSpec, NewSequence
from serve.runner.sampler import Sampler, SamplingRow
from serve.testing.drive import Choice, generate_request, run
from serve.testing.slot_runner import Choose, Chosen, SlotRunner, hash_tokens
from serve.testing.tiny_tokenizer import make_tiny_tokenizer

MakeEngine = Callable[..., Engine]

TOKENIZER = make_tiny_tokenizer()
NUM_REAL = TOKENIZER.get_vocab_size()
VOCAB_SIZE = NUM_REAL + 45
EOS = TOKENIZER.token_to_id("<|im_end|>")
GRAMMARS = GrammarCompiler(
    TOKENIZER.to_str(), eos_token_ids=(EOS,), num_real_tokens=NUM_REAL, vocab_size=VOCAB_SIZE
)
SCHEMA = {
    "type": "object",
    "properties": {
        "steps": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "cost": {"type": "number"},
        "kind": {"enum": ["stable", "in place"]},
    },
    "required": ["steps", "cost", "kind"],
    "additionalProperties": False,
}
SPECS = [GrammarSpec("json_object"), GrammarSpec("json_schema", json.dumps(SCHEMA))]


def choose_at_random() -> Choose:
    sampler = Sampler(vocab_size=VOCAB_SIZE, num_real_tokens=NUM_REAL, eos_token_ids=(EOS,))

    def choose(new: NewSequence, token_ids: list[int], mask: np.ndarray | None) -> Chosen:
        generator = np.random.default_rng(hash_tokens(token_ids, 0))
        logits = (generator.normal(size=(1, VOCAB_SIZE)) * 3).astype(np.float32)
        num_prompt = new.num_prompt_tokens
        row = SamplingRow(new.sampling, token_ids[:num_prompt], token_ids[num_prompt:], mask)
        [sample] = sampler.sample(logits, [row])
        return Chosen(sample.token_id, sample.logprobs, sample.error)

    return choose


@pytest.fixture
def make_json_engine(make_engine: MakeEngine) -> MakeEngine:
    def make(num_total_blocks: int = 400, *, lookahead: bool = False) -> Engine:
        return make_engine(
            lookahead=lookahead,
            runner=SlotRunner(num_total_blocks, 4, choose_at_random()),
            grammars=GRAMMARS,
            eos_token_ids=(EOS,),
            num_total_blocks=num_total_blocks,
        )

    return make


def json_request(seed: int, spec: GrammarSpec, **fields: Any) -> GenerateRequest:
    return generate_request(seed, [5, 6, seed], seed=seed, **{"grammar": spec, **fields})


def text_of(choice: Choice) -> str:
    return str(TOKENIZER.decode(choice.token_ids))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
@pytest.mark.parametrize("max_tokens", [50, 110])
def test_json_of_a_random_model_always_parses(
    make_json_engine: MakeEngine, spec: GrammarSpec, max_tokens: int
) -> None:
    requests = [json_request(seed, spec, max_tokens=max_tokens) for seed in range(16)]
    choices = run(make_json_engine(), requests).choices

    for choice in choices.values():
        answer = json.loads(text_of(choice))
        assert isinstance(answer, dict)
        if spec.kind == "json_schema":
            assert list(answer) == SCHEMA["required"]
        assert len(choice.token_ids) <= max_tokens
    assert {choice.finish_reason for choice in choices.values()} >= {"length"}


def test_json_that_ends_by_itself_stops_at_its_brace(make_json_engine: MakeEngine) -> None:
    bias = {TOKENIZER.token_to_id(token): 9.0 for token in ('"', "}", "]", ":", "0")}
    requests = [
        json_request(seed, SPECS[0], max_tokens=150, logit_bias=bias, min_tokens=4)
        for seed in range(16)
    ]
    choices = run(make_json_engine(), requests).choices

    assert all(choice.finish_reason == "stop" for choice in choices.values())
    assert all(text_of(choice).endswith("}") for choice in choices.values())
    assert all(isinstance(json.loads(text_of(choice)), dict) for choice in choices.values())


def test_too_small_a_budget_ends_with_length(make_json_engine: MakeEngine) -> None:
    choice = run(make_json_engine(), [json_request(1, SPECS[1], max_tokens=3)]).choices[1, 0]

    assert len(choice.token_ids) == 3
    assert choice.finish_reason == "length"


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_json_is_the_same_in_company_after_preemption_and_resumed(
    make_json_engine: MakeEngine, spec: GrammarSpec, lookahead: bool
) -> None:
    requests = [json_request(seed, spec, max_tokens=60) for seed in range(8)]
    alone = [run(make_json_engine(), [request]).choices[i, 0] for i, request in enumerate(requests)]
    tight = make_json_engine(24, lookahead=lookahead)
    crowded = run(tight, requests).choices

    assert [crowded[i, 0] for i in range(8)] == alone
    assert tight.load().num_preemptions_total > 0
    for i, whole in enumerate(alone):
        for num_sent in (1, len(whole.token_ids) // 2, len(whole.token_ids) - 2):
            sent = whole.token_ids[:num_sent]
            request = generate_request(
                9, [5, 6, i], output_token_ids=[sent], seed=i, max_tokens=60, grammar=spec
            )
            rest = run(make_json_engine(lookahead=lookahead), [request]).choices[9, 0]

            assert sent + rest.token_ids == whole.token_ids
            assert rest.finish_reason == whole.finish_reason


def test_token_that_breaks_the_grammar_ends_its_request_alone(make_engine: MakeEngine) -> None:
    def choose(new: NewSequence, token_ids: list[int], mask: np.ndarray | None) -> Chosen:
        brace, other = TOKENIZER.token_to_id("{"), TOKENIZER.token_to_id("a")
        return Chosen(brace if len(token_ids) == new.num_prompt_tokens else other)

    engine = make_engine(runner=SlotRunner(64, 4, choose), grammars=GRAMMARS, eos_token_ids=(EOS,))
    receiver = run(engine, [json_request(1, SPECS[0]), generate_request(2, [5, 6])])

    choice = receiver.choices[1, 0]
    assert (len(choice.token_ids), choice.finish_reason) == (1, "error")
    assert choice.error is not None
    assert choice.error.code == "internal_error"
    assert receiver.summaries[1].num_completion_tokens == 1
    assert len(receiver.choices[2, 0].token_ids) == 8
    assert engine.load().num_generation_tokens_total == 9
