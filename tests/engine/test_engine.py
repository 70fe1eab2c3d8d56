"""What a request gets from the engine: its tokens, in order, and one end."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from serve.engine.engine import Engine
from serve.messages import FinishedOutput, NewSequence
from serve.testing.drive import Receiver, generate_request, run
from serve.testing.slot_runner import (
    Chosen,
    SlotRunner,
    choose_by_hash,
    hash_tokens,
)
from serve.testing.stand_in import StandInRunner

MakeEngine = Callable[..., Engine]


def test_answer_ends_at_max_tokens_with_length(make_engine: MakeEngine) -> None:
    receiver = run(make_engine(), [generate_request(1, [5, 6, 7], max_tokens=6)])

    choice = receiver.choices[1, 0]
    assert len(choice.token_ids) == 6
    assert choice.finish_reason == "length"
    assert receiver.summaries[1].num_prompt_tokens == 3
    assert receiver.summaries[1].num_completion_tokens == 6


def test_a_summary_tells_when_the_first_token_came_and_how_long_it_took(
    make_engine: MakeEngine,
) -> None:
    now_s = 0.0

    class Slow(SlotRunner):
        def sample(self, masks: Mapping[int, np.ndarray]) -> FinishedOutput:
            nonlocal now_s
            now_s += 1.0
            return super().sample(masks)

    engine = make_engine(runner=Slow(64, 4, choose_by_hash), clock=lambda: now_s, token_budget=2)
    summary = run(engine, [generate_request(1, [5, 6, 7, 8], max_tokens=3)]).summaries[1]

    assert summary.ttft_s == 2.0  # two steps of prefill, the second one samples
    assert summary.duration_s == 4.0


def test_an_attempt_that_goes_on_with_earlier_output_has_no_first_token(
    make_engine: MakeEngine,
) -> None:
    request = generate_request(1, [5, 6], output_token_ids=[[7]], max_tokens=3)
    assert run(make_engine(), [request]).summaries[1].ttft_s is None


def test_end_of_sequence_is_the_last_token(make_engine: MakeEngine) -> None:
    receiver = run(make_engine(), [generate_request(1, [9, 6, 7], max_tokens=6)])

    choice = receiver.choices[1, 0]
    assert choice.token_ids[-1] == 1
    assert len(choice.token_ids) == 3
    assert choice.finish_reason == "stop"


def test_end_of_sequence_is_ignored_on_request(make_engine: MakeEngine) -> None:
    request = generate_request(1, [9, 6, 7], max_tokens=6, ignore_eos=True)
    receiver = run(make_engine(), [request])

    assert receiver.choices[1, 0].token_ids[2] == 1
    assert receiver.choices[1, 0].finish_reason == "length"


def test_stop_token_ids_end_an_answer(make_engine: MakeEngine) -> None:
    whole = run(make_engine(), [generate_request(1, [5, 6], max_tokens=9)]).choices[1, 0]
    stop_id = whole.token_ids[4]
    request = generate_request(1, [5, 6], max_tokens=9, stop_token_ids=(stop_id,))
    choice = run(make_engine(), [request]).choices[1, 0]

    first = whole.token_ids.index(stop_id)
    assert choice.token_ids == whole.token_ids[: first + 1]
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize(
    ("settings", "num_tokens"),
    [({"max_model_len": 10}, 7), ({"num_total_blocks": 2}, 6)],
    ids=["context", "pool"],
)
def test_answer_ends_where_context_or_pool_does(
    make_engine: MakeEngine, settings: dict[str, int], num_tokens: int
) -> None:
    receiver = run(make_engine(**settings), [generate_request(1, [5, 6, 7], max_tokens=99)])

    assert len(receiver.choices[1, 0].token_ids) == num_tokens
    assert receiver.choices[1, 0].finish_reason == "length"


def test_choices_are_ordered_by_prompt_then_choice(make_engine: MakeEngine) -> None:
    prompts = [[5, 6], [7, 8, 2]]
    together = run(make_engine(), [generate_request(1, *prompts, n=3)])
    apart = [run(make_engine(), [generate_request(1, prompt, n=3)]) for prompt in prompts]

    texts = [together.choices[1, index].token_ids for index in range(6)]
    assert texts == [apart[p].choices[1, c].token_ids for p in range(2) for c in range(3)]
    assert len({tuple(text) for text in texts}) == 6
    assert together.summaries[1].num_prompt_tokens == 5
    assert together.summaries[1].num_completion_tokens == 48


def test_resumed_request_goes_on_where_it_was(make_engine: MakeEngine) -> None:
    whole = run(make_engine(), [generate_request(1, [5, 6], n=2, max_tokens=9)])
    sent = [whole.choices[1, 0].token_ids[:4], whole.choices[1, 1].token_ids[:7]]
    request = generate_request(2, [5, 6], n=2, max_tokens=9, output_token_ids=sent)
    rest = run(make_engine(), [request])

    for index in range(2):
        choice = rest.choices[2, index]
        assert choice.start == len(sent[index])
        assert sent[index] + choice.token_ids == whole.choices[1, index].token_ids
    assert rest.summaries[2].num_completion_tokens == 18


def test_choice_that_had_ended_ends_again_without_tokens(make_engine: MakeEngine) -> None:
    whole = run(make_engine(), [generate_request(1, [9, 6], n=2, max_tokens=9)])
    sent = [whole.choices[1, 0].token_ids, whole.choices[1, 1].token_ids[:1]]
    request = generate_request(2, [9, 6], n=2, max_tokens=9, output_token_ids=sent)
    rest = run(make_engine(), [request])

    assert rest.choices[2, 0].token_ids == []
    assert rest.choices[2, 0].start == 3
    assert rest.choices[2, 0].finish_reason == "stop"
    assert sent[1] + rest.choices[2, 1].token_ids == whole.choices[1, 1].token_ids


def test_abort_frees_blocks_before_the_next_step(make_engine: MakeEngine) -> None:
    engine = make_engine(max_running_sequences=2)
    engine.add(generate_request(1, [5] * 9, n=3))
    engine.step()
    assert engine.load().num_used_blocks > 0
    engine.abort(1)

    assert engine.load().num_used_blocks == 0
    assert engine.load().num_running == engine.load().num_waiting == 0
    assert engine.load().num_waiting_tokens == 0
    engine.check_integrity()


def test_aborted_request_ends_once_and_its_neighbour_is_unharmed(make_engine: MakeEngine) -> None:
    alone = run(make_engine(), [generate_request(2, [7, 8], max_tokens=12)]).choices[2, 0]
    engine = make_engine()
    engine.add(generate_request(1, [5, 6], max_tokens=12))
    engine.add(generate_request(2, [7, 8], max_tokens=12))
    receiver = Receiver()
    receiver.take(engine.step())
    engine.abort(1)
    engine.abort(1)
    engine.abort(99)
    while engine.has_work:
        receiver.take(engine.step())

    assert receiver.choices[1, 0].finish_reason == "abort"
    assert receiver.summaries[1].finish_reasons == ["abort"]
    assert receiver.choices[2, 0].token_ids == alone.token_ids


@pytest.mark.parametrize("lookahead", [False, True])
def test_abort_comes_after_the_tokens_that_were_made_before_it(
    make_engine: MakeEngine, lookahead: bool
) -> None:
    engine = make_engine(lookahead=lookahead)
    receiver = Receiver()
    engine.add(generate_request(1, [5, 6], max_tokens=12))
    receiver.take(engine.step())
    engine.start_step()
    engine.finish_step()
    engine.abort(1)
    receiver.take(engine.take_result())
    while engine.has_work:
        receiver.take(engine.step())

    assert len(receiver.choices[1, 0].token_ids) == (1 if lookahead else 2)
    assert receiver.choices[1, 0].finish_reason == "abort"


def test_poisoned_sequence_ends_alone(make_engine: MakeEngine) -> None:
    def choose(new: NewSequence, token_ids: list[int], mask: np.ndarray | None) -> Chosen:
        is_poisoned = token_ids[0] == 3 and len(token_ids) == 6
        error = "The model's logits are not finite" if is_poisoned else None
        return Chosen(2 + hash_tokens(token_ids, 0) % 50, None, error)

    receivers = [
        run(make_engine(runner=SlotRunner(64, 4, choose)), requests)
        for requests in (
            [generate_request(1, [3, 4]), generate_request(2, [5, 6])],
            [generate_request(2, [5, 6])],
        )
    ]

    poisoned = receivers[0].choices[1, 0]
    assert len(poisoned.token_ids) == 4
    assert poisoned.finish_reason == "error"
    assert poisoned.error is not None
    assert poisoned.error.code == "poisoned_request"
    assert receivers[0].summaries[1].error == poisoned.error
    assert receivers[0].choices[2, 0] == receivers[1].choices[2, 0]


def test_load_counts_sequences_and_tokens(make_engine: MakeEngine) -> None:
    engine = make_engine(max_running_sequences=2)
    engine.add(generate_request(1, [5] * 4, n=3))
    receiver = Receiver()
    receiver.take(engine.step())
    load = engine.load()

    assert (load.num_running, load.num_waiting, load.num_waiting_tokens) == (2, 1, 4)
    assert load.num_total_blocks == 64
    while engine.has_work:
        receiver.take(engine.step())
    load = engine.load()
    assert load.num_prompt_tokens_total == 12
    assert load.num_generation_tokens_total == 24
    assert load.num_running == load.num_waiting == load.num_used_blocks == 0


def test_stand_in_tokens_tell_stream_and_position(make_engine: MakeEngine) -> None:
    slept: list[float] = []
    runner = StandInRunner(0.02, 64, 1000, sleep=slept.append, clock=lambda: 0.0)
    engine = make_engine(runner=runner, eos_token_ids=(0,))
    requests = [generate_request(i, [i, 5, 6], seed=i, max_tokens=40) for i in range(1, 9)]
    crowded = run(engine, requests)
    alone = run(make_engine(runner=StandInRunner(0.0, 64, 1000)), [requests[3]])

    assert crowded.choices[4, 0] == alone.choices[4, 0]
    assert len({tuple(choice.token_ids) for choice in crowded.choices.values()}) == 8
    assert all(32 <= t < 94 for choice in crowded.choices.values() for t in choice.token_ids)
    assert slept == [0.02] * engine.load().num_steps_total
