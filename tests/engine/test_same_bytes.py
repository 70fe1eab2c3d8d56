"""A request's tokens and logprobs do not depend on the company it keeps."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from serve.engine.engine import Engine
from serve.messages import NewSequence
from serve.runner.sampler import Sampler, SamplingRow
from serve.testing.drive import Choice, generate_request, run
from serve.testing.slot_runner import Chosen, SlotRunner, hash_tokens

MakeEngine = Callable[..., Engine]
VOCAB_SIZE = 300

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1},
    {"temperature": 1.3, "min_p": 0.05, "logprobs": 3},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5, "min_tokens": 6, "logit_bias": {7: 2.0}},
]


def make_runner(num_total_blocks: int) -> SlotRunner:
    sampler = Sampler(vocab_size=VOCAB_SIZE, num_real_tokens=290, eos_token_ids=(1,))

    def choose(new: NewSequence, token_ids: list[int], mask: np.ndarray | None) -> Chosen:
        generator = np.random.default_rng(hash_tokens(token_ids, 0))
        logits = (generator.normal(size=(1, VOCAB_SIZE)) * 2).astype(np.float32)
        num_prompt = new.num_prompt_tokens
        row = SamplingRow(new.sampling, token_ids[:num_prompt], token_ids[num_prompt:], mask)
        [sample] = sampler.sample(logits, [row])
        return Chosen(sample.token_id, sample.logprobs, sample.error)

    return SlotRunner(num_total_blocks, 4, choose)


REQUESTS = [
    generate_request(i, list(range(5 + i, 9 + 2 * i)), seed=i, max_tokens=24, **KINDS[i % 4])
    for i in range(16)
]


def choices_of(engine: Engine) -> list[Choice]:
    receiver = run(engine, REQUESTS)
    return [receiver.choices[i, 0] for i in range(16)]


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_alone_in_a_batch_of_16_and_after_preemption_the_bytes_are_the_same(
    make_engine: MakeEngine, lookahead: bool, prefix_cache: bool
) -> None:
    alone = [
        run(make_engine(runner=make_runner(64)), [request]).choices[i, 0]
        for i, request in enumerate(REQUESTS)
    ]
    kind = {"lookahead": lookahead, "prefix_cache": prefix_cache}
    roomy = make_engine(runner=make_runner(400), num_total_blocks=400, token_budget=512, **kind)
    tight = make_engine(runner=make_runner(20), num_total_blocks=20, token_budget=20, **kind)

    assert choices_of(roomy) == alone
    assert roomy.load().num_preemptions_total == 0
    assert choices_of(tight) == alone
    assert tight.load().num_preemptions_total > 0
    assert any(choice.logprobs for choice in alone)


@pytest.mark.parametrize("num_sent", [1, 5, 11])
def test_resumed_elsewhere_the_bytes_are_the_same(make_engine: MakeEngine, num_sent: int) -> None:
    for i, request in enumerate(REQUESTS[:4]):
        whole = run(make_engine(runner=make_runner(64)), [request]).choices[i, 0]
        sent = whole.token_ids[:num_sent]
        fields = {**KINDS[i % 4], "seed": i, "max_tokens": 24}
        resumed = generate_request(
            99, request.prompts[0].token_ids, output_token_ids=[sent], **fields
        )
        rest = run(make_engine(runner=make_runner(64)), [resumed]).choices[99, 0]

        assert sent + rest.token_ids == whole.token_ids
        assert rest.logprobs == whole.logprobs[len(sent) :]
