"""What sequences that begin alike need not compute, and that nobody else's blocks are theirs."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine.engine import Engine
from serve.engine.prefix_keys import PrefixKeys
from serve.messages import GenerateRequest, NewSequence, Prompt
from serve.prefix import hash_blocks
from serve.testing.drive import Receiver, generate_request, run
from serve.testing.slot_runner import Choose, Chosen, SlotRunner, choose_by_hash

MakeEngine = Callable[..., Engine]

PROMPT = list(range(10, 31))  # 21 tokens: five full blocks of 4, and one


def new_runner(num_total_blocks: int = 64, choose: Choose = choose_by_hash) -> SlotRunner:
    return SlotRunner(num_total_blocks, 4, choose)


@pytest.mark.parametrize("lookahead", [False, True])
def test_an_equal_prompt_computes_only_what_follows_its_full_blocks(
    make_engine: MakeEngine, lookahead: bool
) -> None:
    runner = new_runner()
    engine = make_engine(runner=runner, lookahead=lookahead)
    first = run(engine, [generate_request(1, PROMPT)])
    num_before = runner.num_computed_tokens
    second = run(engine, [generate_request(2, PROMPT)])

    assert second.choices[2, 0].token_ids == first.choices[1, 0].token_ids
    assert num_before - 7 == 21
    assert runner.num_computed_tokens - num_before - 7 == 1
    assert first.choices[1, 0].num_cached_tokens == 0
    assert second.choices[2, 0].num_cached_tokens == 20
    load = engine.load()
    assert (load.num_cache_query_tokens_total, load.num_cache_hit_tokens_total) == (42, 20)
    assert load.num_cached_blocks == 7  # 21 + 7 tokens; the last one sampled is not computed


def test_at_least_one_token_is_computed(make_engine: MakeEngine) -> None:
    runner = new_runner()
    engine = make_engine(runner=runner)
    run(engine, [generate_request(1, PROMPT[:8], max_tokens=1)])
    receiver = run(engine, [generate_request(2, PROMPT[:8], max_tokens=1)])

    assert runner.num_computed_tokens == 8 + 4
    assert receiver.choices[2, 0].num_cached_tokens == 4


def test_the_next_turn_finds_the_answer_s_blocks(make_engine: MakeEngine) -> None:
    runner = new_runner()
    engine = make_engine(runner=runner)
    answer = run(engine, [generate_request(1, PROMPT, max_tokens=12)]).choices[1, 0].token_ids
    turn = [*PROMPT, *answer, 5, 6, 7]
    receiver = run(engine, [generate_request(2, turn)])

    assert receiver.choices[2, 0].num_cached_tokens == 32  # 21 + 11 computed tokens, in blocks of 4


def test_blocks_are_shared_from_the_step_after_the_one_that_computes_them(
    make_engine: MakeEngine,
) -> None:
    runner = new_runner()
    engine = make_engine(runner=runner)
    engine.add(generate_request(1, PROMPT[:12]))
    engine.add(generate_request(2, PROMPT[:12]))
    engine.step()
    together = runner.num_computed_tokens
    engine.add(generate_request(3, PROMPT[:12]))
    engine.step()

    assert together == 16  # the first step's budget: both compute for themselves
    assert engine.load().num_cache_hit_tokens_total == 8


def test_namespaces_share_nothing(make_engine: MakeEngine) -> None:
    runner = new_runner()
    engine = make_engine(runner=runner)
    for stream_id, namespace in enumerate([b"one", b"two", b""]):
        request = generate_request(stream_id, PROMPT, namespace=namespace, max_tokens=1)
        assert run(engine, [request]).choices[stream_id, 0].num_cached_tokens == 0
    again = generate_request(9, PROMPT, namespace=b"two", max_tokens=1)

    assert runner.num_computed_tokens == 3 * 21
    assert run(engine, [again]).choices[9, 0].num_cached_tokens == 20


@settings(max_examples=100)
@given(
    num_tokens=st.integers(0, 200),
    num_prompt_tokens=st.integers(0, 200),
    seed=st.integers(0, 9),
    block_size=st.sampled_from([1, 4, 16, 24, 32, 64]),
    is_hashed=st.booleans(),
)
def test_a_key_depends_on_tokens_and_namespace_not_on_who_computed_it(
    num_tokens: int, num_prompt_tokens: int, seed: int, block_size: int, is_hashed: bool
) -> None:
    def keys_of(tokens: list[int], num_prompt: int, namespace: bytes) -> list[bytes]:
        prompt = tokens[:num_prompt]
        hashes = hash_blocks(prompt) if is_hashed else []
        keys = PrefixKeys(Prompt(prompt, hashes), namespace=namespace, block_size=block_size)
        return keys.first(len(tokens) // block_size, tokens)

    token_ids = np.random.default_rng(seed).integers(0, 3, num_tokens).tolist()
    keys = keys_of(token_ids, num_prompt_tokens, b"a")
    assert keys == keys_of(token_ids, len(token_ids), b"a")
    assert len(set(keys)) == len(token_ids) // block_size
    assert not set(keys) & set(keys_of(token_ids, len(token_ids), b"ab"))
    changed = [9, *token_ids[1:]]
    assert not set(keys) & set(keys_of(changed, len(changed), b"a"))


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("token_budget", [8, 64])
def test_choices_compute_a_prompt_s_full_blocks_once(
    make_engine: MakeEngine, lookahead: bool, prefix_cache: bool, token_budget: int
) -> None:
    runner = new_runner()
    engine = make_engine(
        runner=runner, lookahead=lookahead, prefix_cache=prefix_cache, token_budget=token_budget
    )
    receiver = run(engine, [generate_request(1, PROMPT, n=4, max_tokens=6)])
    alone = run(make_engine(), [generate_request(1, PROMPT, n=4, max_tokens=6)])

    assert receiver.choices[1, 0].num_cached_tokens == 0
    assert [receiver.choices[1, i].token_ids for i in range(4)] == [
        alone.choices[1, i].token_ids for i in range(4)
    ]
    assert runner.num_computed_tokens == 20 + 4 * (1 + 5)


def test_choices_of_two_prompts_wait_for_their_own_prompt_only(make_engine: MakeEngine) -> None:
    runner = new_runner()
    engine = make_engine(runner=runner)
    other = [token_id + 50 for token_id in PROMPT]
    receiver = run(engine, [generate_request(1, PROMPT, other, n=2, max_tokens=1)])

    assert runner.num_computed_tokens == 2 * (21 + 1)
    assert len({tuple(receiver.choices[1, i].token_ids) for i in range(4)}) == 4


def test_preempting_one_choice_leaves_the_others_right(make_engine: MakeEngine) -> None:
    requests = [generate_request(i, PROMPT, n=3, max_tokens=20, seed=i) for i in range(2)]
    roomy = run(make_engine(num_total_blocks=200, token_budget=256), requests)
    tight_engine = make_engine(num_total_blocks=16)
    tight = run(tight_engine, requests)

    assert tight_engine.load().num_preemptions_total > 0
    assert {key: one.token_ids for key, one in tight.choices.items()} == {
        key: one.token_ids for key, one in roomy.choices.items()
    }


def test_a_preempted_sequence_comes_back_through_the_cache(make_engine: MakeEngine) -> None:
    def computed(prefix_cache: bool) -> int:
        runner = new_runner(12)
        engine = make_engine(runner=runner, num_total_blocks=12, prefix_cache=prefix_cache)
        run(engine, [generate_request(i, [9 + i] * 14, max_tokens=14) for i in range(3)])
        assert engine.load().num_preemptions_total > 0
        return runner.num_computed_tokens

    assert computed(True) < computed(False)


def test_cached_blocks_are_evicted_before_anybody_is_preempted(make_engine: MakeEngine) -> None:
    engine = make_engine(num_total_blocks=10)
    for stream_id in range(6):
        run(engine, [generate_request(stream_id, [5 + stream_id] * 20, max_tokens=16)])

    load = engine.load()
    assert load.num_preemptions_total == 0
    assert load.num_evicted_blocks_total > 0
    assert load.num_used_blocks == 0
    assert load.num_cached_blocks == 9  # 8 of the last one, 1 still of the one before


def test_cached_blocks_count_as_room_for_new_requests(make_engine: MakeEngine) -> None:
    engine = make_engine(num_total_blocks=6, max_waiting_requests=0)
    run(engine, [generate_request(1, [5] * 20, max_tokens=2)])
    assert engine.load().num_cached_blocks == 5

    engine.add(generate_request(2, [6] * 20, max_tokens=2))
    assert len(run(engine).choices[2, 0].token_ids) == 2


def test_without_the_cache_nothing_is_kept(make_engine: MakeEngine) -> None:
    runner = new_runner()
    engine = make_engine(runner=runner, prefix_cache=False)
    for stream_id in (1, 2):
        run(engine, [generate_request(stream_id, PROMPT, max_tokens=1)])

    assert runner.num_computed_tokens == 2 * 21
    assert engine.load().num_cached_blocks == 0
    assert engine.load().num_cache_query_tokens_total == 0


def test_a_poisoned_sequence_leaves_nothing_in_the_cache(make_engine: MakeEngine) -> None:
    is_poisoned = True

    def choose(new: NewSequence, token_ids: list[int], mask: np.ndarray | None) -> Chosen:
        error = "not finite" if is_poisoned else None
        return Chosen(2, None, error)

    engine = make_engine(runner=new_runner(choose=choose))
    assert run(engine, [generate_request(1, PROMPT, n=2)]).choices[1, 0].finish_reason == "error"
    assert engine.load().num_cached_blocks == 0
    is_poisoned = False

    assert run(engine, [generate_request(2, PROMPT)]).choices[2, 0].num_cached_tokens == 0


@pytest.mark.parametrize("is_started", [False, True])
def test_an_aborted_prompt_s_full_blocks_are_kept(
    make_engine: MakeEngine, is_started: bool
) -> None:
    """Those of steps that are over; blocks of a step in flight never are."""
    runner = new_runner()
    engine = make_engine(runner=runner, token_budget=16)
    engine.add(generate_request(1, PROMPT * 2))
    receiver = Receiver()
    receiver.take(engine.step())
    engine.start_step()
    if not is_started:
        engine.finish_step()
    engine.abort(1)
    if is_started:
        engine.finish_step()
    receiver.take(engine.take_result())
    engine.check_integrity()

    assert receiver.choices[1, 0].finish_reason == "abort"
    assert engine.load().num_cached_blocks == (4 if is_started else 8)
    assert run(engine, [_again()]).choices[2, 0].num_cached_tokens == (16 if is_started else 32)


def _again() -> GenerateRequest:
    return generate_request(2, PROMPT * 2)
