"""Who is taken and who is refused, with the limit and the value in the message."""

from collections.abc import Callable

import pytest

from serve.engine.engine import Engine
from serve.errors import ContextLengthError, InvalidRequestError, OverloadedError
from serve.messages import GrammarSpec
from serve.testing.drive import generate_request, run

MakeEngine = Callable[..., Engine]


def test_waiting_requests_are_bounded(make_engine: MakeEngine) -> None:
    engine = make_engine(max_running_sequences=2, max_waiting_requests=3)
    for stream_id in range(5):
        engine.add(generate_request(stream_id, [5, 6]))

    with pytest.raises(OverloadedError, match="max_waiting_requests is 3") as caught:
        engine.add(generate_request(5, [5, 6]))
    assert caught.value.status == 429
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s >= 1
    assert engine.load().num_waiting == 5


def test_waiting_tokens_are_bounded(make_engine: MakeEngine) -> None:
    engine = make_engine(max_running_sequences=1, max_waiting_tokens=50)
    engine.add(generate_request(1, [5] * 40))
    engine.add(generate_request(2, [5] * 20, n=2))

    with pytest.raises(OverloadedError, match=r"max_waiting_tokens is 50, .* 51 would wait"):
        engine.add(generate_request(3, [5] * 11))
    engine.add(generate_request(4, [5] * 10))


def test_request_that_can_start_now_is_never_refused(make_engine: MakeEngine) -> None:
    engine = make_engine(max_running_sequences=2, max_waiting_requests=0, max_waiting_tokens=1)
    engine.add(generate_request(1, [5] * 40))
    engine.add(generate_request(2, [5] * 40))

    with pytest.raises(OverloadedError):
        engine.add(generate_request(3, [5]))
    run(engine)
    engine.add(generate_request(4, [5] * 40, n=2))


def test_request_without_free_blocks_waits_and_is_counted(make_engine: MakeEngine) -> None:
    engine = make_engine(num_total_blocks=4, max_waiting_requests=0)
    engine.add(generate_request(1, [5] * 12))

    with pytest.raises(OverloadedError):
        engine.add(generate_request(2, [5] * 12))


def test_refused_request_leaves_nothing_behind(make_engine: MakeEngine) -> None:
    engine = make_engine(max_running_sequences=2, max_waiting_requests=0)

    with pytest.raises(OverloadedError):
        engine.add(generate_request(1, [5, 6], n=3))
    assert not engine.has_work
    assert engine.load().num_waiting == 0
    engine.add(generate_request(1, [5, 6], n=2))


def test_full_queue_empties_and_takes_again(make_engine: MakeEngine) -> None:
    engine = make_engine(max_running_sequences=1, max_waiting_requests=1)
    engine.add(generate_request(1, [5, 6]))
    engine.add(generate_request(2, [5, 6]))
    with pytest.raises(OverloadedError):
        engine.add(generate_request(3, [5, 6]))
    run(engine)

    engine.add(generate_request(4, [5, 6]))


@pytest.mark.parametrize("num_tokens", [200, 201, 5000])
def test_prompt_without_room_for_an_answer_is_refused(
    make_engine: MakeEngine, num_tokens: int
) -> None:
    with pytest.raises(ContextLengthError, match=rf"<= 200 tokens, got {num_tokens}"):
        make_engine().add(generate_request(1, [5] * num_tokens))


def test_prompt_that_never_fits_the_pool_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine(num_total_blocks=4)

    with pytest.raises(ContextLengthError, match="KV cache of 16 tokens, got 17"):
        engine.add(generate_request(1, [5] * 17))
    assert len(run(engine, [generate_request(2, [5] * 16)]).choices[2, 0].token_ids) == 1


def test_one_bad_prompt_refuses_the_whole_request(make_engine: MakeEngine) -> None:
    engine = make_engine()

    with pytest.raises(InvalidRequestError, match=">= 1 token, got 0"):
        engine.add(generate_request(1, [5, 6], []))
    assert not engine.has_work


def test_grammar_without_a_compiler_is_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(InvalidRequestError, match="json_object"):
        make_engine().add(generate_request(1, [5], grammar=GrammarSpec("json_object")))


def test_retry_after_follows_the_measured_rate(make_engine: MakeEngine) -> None:
    now = iter(range(1000))
    engine = make_engine(
        max_running_sequences=1, max_waiting_requests=1, clock=lambda: float(next(now))
    )
    run(engine, [generate_request(1, [5, 6], max_tokens=30)])
    engine.add(generate_request(2, [5]))
    engine.add(generate_request(3, [5] * 12))

    with pytest.raises(OverloadedError) as caught:
        engine.add(generate_request(4, [5]))
    assert caught.value.retry_after_s == pytest.approx(13, abs=1)
