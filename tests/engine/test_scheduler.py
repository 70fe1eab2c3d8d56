"""Order, chunks and preemption."""

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest

from serve.engine.budget import TokenBudget
from serve.engine.engine import Engine
from serve.messages import FinishedOutput, StepInput, StepOutput
from serve.testing.drive import Receiver, generate_request, run
from serve.testing.slot_runner import SlotRunner, choose_by_hash
from serve.testing.stand_in import StandInRunner

MakeEngine = Callable[..., Engine]


class RecordingRunner(StandInRunner):
    """Keeps every step it was given."""

    def __init__(self, num_total_blocks: int) -> None:
        super().__init__(0.0, num_total_blocks, 1000)
        self.steps: list[StepInput] = []

    def start(self, step: StepInput) -> None:
        self.steps.append(step)
        super().start(step)


def test_prompt_is_computed_in_chunks_beside_decodes(make_engine: MakeEngine) -> None:
    runner = RecordingRunner(64)
    engine = make_engine(runner=runner, token_budget=16)
    engine.add(generate_request(1, [5, 6], max_tokens=20))
    engine.step()
    engine.add(generate_request(2, [7] * 40, max_tokens=2))
    run(engine)

    chunks = [chunk for step in runner.steps for chunk in step.chunks]
    assert [(c.slot, c.num_computed_tokens, c.num_scheduled_tokens) for c in chunks] == [
        (0, 0, 2),
        (1, 0, 15),
        (1, 15, 15),
        (1, 30, 10),
    ]
    assert [chunk.is_sampled for chunk in chunks] == [True, False, False, True]
    slots = [array("i", step.decodes).tolist() for step in runner.steps]
    assert slots == [[], [0], [0], [0], [0, 1]] + [[0]] * 15


def test_each_block_is_given_to_the_runner_once(make_engine: MakeEngine) -> None:
    runner = RecordingRunner(64)
    run(make_engine(runner=runner), [generate_request(1, [5] * 10, max_tokens=20)])

    given = [i for step in runner.steps for one in step.new for i in one.block_ids]
    given += [i for step in runner.steps for one in step.more_blocks for i in one.block_ids]
    assert len(given) == len(set(given)) == 8  # 29 slots of 4: the last token needs none


def test_requests_start_in_order_of_arrival(make_engine: MakeEngine) -> None:
    runner = RecordingRunner(64)
    engine = make_engine(runner=runner, max_running_sequences=2)
    run(engine, [generate_request(i, [5 + i] * (1 + i % 3)) for i in range(9)])

    started = [new.token_ids for step in runner.steps for new in step.new]
    assert started == [[5 + i] * (1 + i % 3) for i in range(9)]


def test_small_request_does_not_overtake_one_that_waits_for_blocks(
    make_engine: MakeEngine,
) -> None:
    runner = RecordingRunner(8)
    engine = make_engine(runner=runner, num_total_blocks=8)
    prompts = {1: [5] * 20, 2: [6] * 20, 3: [7]}
    run(engine, [generate_request(i, prompt, max_tokens=2) for i, prompt in prompts.items()])

    started = [new.token_ids for step in runner.steps for new in step.new]
    assert started == [prompts[1], prompts[2], prompts[3]]
    assert len(runner.steps[0].new) == 1


def test_preempted_sequence_resumes_with_same_tokens(make_engine: MakeEngine) -> None:
    requests = [generate_request(i, [5 + i, 6, 7], max_tokens=20, seed=i) for i in range(6)]
    tight = make_engine(num_total_blocks=8)
    crowded = run(tight, requests)
    alone = {i: run(make_engine(), [request]).choices[i, 0] for i, request in enumerate(requests)}

    assert tight.load().num_preemptions_total > 0
    assert tight.load().num_prompt_tokens_total == 18
    assert {i: crowded.choices[i, 0] for i in range(6)} == alone


def test_sequence_preempted_with_a_token_in_flight_keeps_that_token(
    make_engine: MakeEngine,
) -> None:
    """Its shared blocks leave so little to ask for that it could start again at once."""
    request = generate_request(1, list(range(2, 12)), n=2, max_tokens=6)
    settings = {"block_size": 2, "max_running_sequences": 2, "token_budget": 2, "lookahead": True}
    tight = make_engine(runner=SlotRunner(10, 2, choose_by_hash), num_total_blocks=10, **settings)
    crowded = run(tight, [request])
    roomy = run(make_engine(runner=SlotRunner(64, 2, choose_by_hash), **settings), [request])

    assert tight.load().num_preemptions_total > 0
    assert crowded.choices == roomy.choices


@pytest.mark.parametrize("num_old_tokens", [1, 2, 3])
@pytest.mark.parametrize("lookahead", [False, True])
def test_prompt_preempted_with_a_chunk_in_flight_is_computed_again(
    make_engine: MakeEngine, lookahead: bool, num_old_tokens: int
) -> None:
    def run_both(num_total_blocks: int) -> tuple[Engine, Receiver]:
        engine = make_engine(
            runner=SlotRunner(num_total_blocks, 4, choose_by_hash),
            num_total_blocks=num_total_blocks,
            token_budget=2,
            lookahead=lookahead,
        )
        old = generate_request(1, list(range(2, 2 + num_old_tokens)), max_tokens=14)
        return engine, run(engine, [old, generate_request(2, list(range(20, 32)), max_tokens=2)])

    tight, crowded = run_both(5)

    assert tight.load().num_preemptions_total > 0
    assert crowded.choices == run_both(64)[1].choices


def test_pool_for_three_serves_32_clients_with_few_preemptions(make_engine: MakeEngine) -> None:
    runner = SlotRunner(30, 4, choose_by_hash)
    engine = make_engine(runner=runner, num_total_blocks=30, max_running_sequences=32)
    requests = [generate_request(i, [5, 6, 7, i], max_tokens=36) for i in range(32)]
    receiver = run(engine, requests)

    assert all(len(choice.token_ids) == 36 for choice in receiver.choices.values())
    assert max(runner.num_starts.values()) - 1 <= 4


def test_oldest_request_advances_in_every_step(make_engine: MakeEngine) -> None:
    engine = make_engine(num_total_blocks=6, token_budget=16)
    for i in range(12):
        engine.add(generate_request(i, [5 + i] * 10, max_tokens=12))
    receiver = Receiver()
    finished: list[int] = []
    while engine.has_work:
        result = engine.step()
        receiver.take(result)
        finished += [summary.stream_id for summary in result.summaries]
        oldest = min(set(range(12)) - set(finished), default=None)
        if oldest is not None and (oldest, 0) in receiver.choices:
            assert any(d.stream_id in (oldest, oldest - 1) for d in result.deltas)

    assert finished == sorted(finished)


def test_budget_finds_the_largest_step_that_is_short_enough() -> None:
    budget = TokenBudget(4096, 1.0, max_slowdown=2.25)
    durations = []
    for _ in range(30):
        num_tokens = budget.tokens
        durations.append(0.05 + num_tokens * 0.002)
        budget.observe(num_tokens, num_decode_tokens=0, duration_s=durations[-1])

    assert max(durations) <= 1.0
    assert durations[-1] >= 0.8


class TimedRunner(StandInRunner):
    """A device on a clock of its own: steps queue up and each takes as long as its tokens."""

    def __init__(self) -> None:
        super().__init__(0.0, 1000, 1000, clock=lambda: 0.0)
        self.now_s = 0.0
        self.durations_s: list[float] = []
        self._free_s = 0.0

    def start(self, step: StepInput) -> None:
        num_tokens = len(step.decodes) // 4
        num_tokens += sum(chunk.num_scheduled_tokens for chunk in step.chunks)
        self.durations_s.append(0.05 + 0.002 * num_tokens)
        self._free_s = max(self._free_s, self.now_s) + self.durations_s[-1]
        super().start(step)

    def sample(self, masks: Mapping[int, np.ndarray]) -> FinishedOutput:
        finished = super().sample(masks)
        return TimedOutput(finished.output, self, self._free_s)


@dataclass(frozen=True, slots=True)
class TimedOutput(FinishedOutput):
    runner: TimedRunner
    ready_s: float

    def result(self) -> StepOutput:
        self.runner.now_s = max(self.runner.now_s, self.ready_s)
        return self.output


@pytest.mark.parametrize("lookahead", [False, True])
def test_budget_learns_the_length_of_steps_that_queue_up(
    make_engine: MakeEngine, lookahead: bool
) -> None:
    runner = TimedRunner()
    engine = make_engine(
        runner=runner,
        clock=lambda: runner.now_s,
        lookahead=lookahead,
        token_budget=4096,
        num_total_blocks=1000,
        max_model_len=3900,
    )
    run(engine, [generate_request(i, list(range(3800)), max_tokens=9, seed=i) for i in range(3)])

    assert max(runner.durations_s) <= 1.0
    assert sum(duration_s >= 0.8 for duration_s in runner.durations_s) >= 5


def test_budget_shrinks_at_once_and_not_below_its_floor() -> None:
    budget = TokenBudget(512, 1.0, max_slowdown=2.25)
    for _ in range(10):
        budget.observe(budget.tokens, num_decode_tokens=0, duration_s=0.001)
    assert budget.tokens == 512
    budget.observe(512, num_decode_tokens=0, duration_s=4.0)
    assert budget.tokens <= 128
    budget.observe(budget.tokens, num_decode_tokens=0, duration_s=400.0)

    assert budget.tokens == 16


def _steps_beside_decodes(budget: TokenBudget, *, decode_s: float, s_per_token: float) -> float:
    """The longest of the last of 40 steps of 8 decodes and as much prompt as the budget lets in."""
    durations = []
    for _ in range(40):
        num_prefill = budget.prefill_tokens(8)
        durations.append(decode_s + num_prefill * s_per_token)
        budget.observe(8 + num_prefill, num_decode_tokens=8, duration_s=durations[-1])
    return max(durations[-20:])


def test_a_long_prompt_slows_decodes_by_the_factor_that_is_allowed() -> None:
    budget = TokenBudget(4096, 1.0, max_slowdown=2.25)
    budget.observe(8, num_decode_tokens=8, duration_s=0.05)
    longest_s = _steps_beside_decodes(budget, decode_s=0.05, s_per_token=0.0005)
    assert 1.8 * 0.05 < longest_s <= 2.25 * 0.05


def test_a_long_prompt_is_held_back_before_any_step_without_one_was_seen() -> None:
    budget = TokenBudget(4096, 1.0, max_slowdown=2.25)
    budget.observe(16, num_decode_tokens=0, duration_s=0.058)
    longest_s = _steps_beside_decodes(budget, decode_s=0.05, s_per_token=0.0005)
    assert longest_s <= 2.25 * 0.058


def test_one_lucky_step_does_not_let_much_more_of_a_prompt_in() -> None:
    budget = TokenBudget(4096, 1.0, max_slowdown=2.25)
    budget.observe(8, num_decode_tokens=8, duration_s=0.05)
    _steps_beside_decodes(budget, decode_s=0.05, s_per_token=0.0005)
    known = budget.tokens_beside_decodes
    budget.observe(8 + known, num_decode_tokens=8, duration_s=0.05 + 0.5 * known * 0.0005)

    assert known <= budget.tokens_beside_decodes <= 1.15 * known


def test_prompts_get_more_when_decodes_themselves_became_slow() -> None:
    budget = TokenBudget(4096, 1.0, max_slowdown=2.25)
    _steps_beside_decodes(budget, decode_s=0.05, s_per_token=0.001)
    for _ in range(5):
        _steps_beside_decodes(budget, decode_s=0.1, s_per_token=0.001)
    assert 80 < budget.tokens_beside_decodes <= 125


def test_a_prompt_alone_is_not_held_back_by_decodes_of_the_past() -> None:
    budget = TokenBudget(512, 1.0, max_slowdown=2.25)
    _steps_beside_decodes(budget, decode_s=0.05, s_per_token=0.002)
    for _ in range(10):
        num_tokens = budget.prefill_tokens(0)
        budget.observe(num_tokens, num_decode_tokens=0, duration_s=0.002 * num_tokens)
    assert budget.prefill_tokens(0) > 400


def test_slow_decodes_do_not_shrink_the_budget() -> None:
    budget = TokenBudget(512, 1.0, max_slowdown=2.25)
    for _ in range(10):
        budget.observe(budget.tokens, num_decode_tokens=0, duration_s=0.001)
    budget.observe(64, num_decode_tokens=64, duration_s=3.0)

    assert budget.tokens == 512


@pytest.mark.parametrize(
    ("max_tokens", "num_decode_tokens", "left"),
    [(512, 0, 16), (512, 10, 16), (512, 500, 12), (32, 31, 1), (32, 32, 0)],
)
def test_prompts_keep_a_share_beside_any_number_of_decodes(
    max_tokens: int, num_decode_tokens: int, left: int
) -> None:
    assert TokenBudget(max_tokens, 1.0, max_slowdown=2.25).prefill_tokens(num_decode_tokens) == left


def test_no_step_is_larger_than_the_budget(make_engine: MakeEngine) -> None:
    runner = SlotRunner(64, 4, choose_by_hash)
    engine = make_engine(runner=runner, token_budget=16)
    run(engine, [generate_request(i, [5] * (1 + 7 * i % 40)) for i in range(12)])

    assert runner.max_step_tokens == 16


def test_small_budget_still_serves_many_sequences(make_engine: MakeEngine) -> None:
    engine = make_engine(token_budget=16, max_running_sequences=64)
    receiver = run(engine, [generate_request(i, [10 + i] * 20) for i in range(24)])

    assert [len(choice.token_ids) for choice in receiver.choices.values()] == [8] * 24
