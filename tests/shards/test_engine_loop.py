"""The engine thread: what is told while a step runs, and when it sleeps."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import pytest

from serve.engine.engine import Engine
from serve.engine.settings import EngineSettings
from serve.messages import Add, Drop, FinishedOutput, Load, StepInput, Summary, TokenDelta
from serve.shards.control import ControlLink
from serve.shards.engine_loop import EngineLoop
from serve.shards.inbox import Inbox
from serve.shards.streams import TokenStreams
from serve.testing.drive import generate_request
from serve.testing.stand_in import StandInRunner


class NothingLeftError(Exception):
    """The engine thread would sleep from here on."""


class EndingInbox(Inbox[Add | Drop]):
    """Where a shard would sleep until the next request, the test is over."""

    def wait(self) -> None:
        if not self._is_filled.is_set():
            raise NothingLeftError


class World(StandInRunner):
    """Runner, control link, token streams and inbox in one, so that `log` is one order of events.

    `on_sample` is called with the number of each step while it runs.
    """

    def __init__(self, on_sample: Callable[["World", int], None]) -> None:
        super().__init__(0.0, 64, 1000)
        self.log: list[Any] = []
        self.summaries: list[Summary] = []
        self.inbox: Inbox[Add | Drop] = EndingInbox()
        self._on_sample = on_sample

    def start(self, step: StepInput) -> None:
        self.log.append(("start", step.step_id))
        super().start(step)

    def sample(self, masks: Mapping[int, np.ndarray]) -> FinishedOutput:
        self.log.append("sample")
        self._on_sample(self, sum(entry == "sample" for entry in self.log))
        return super().sample(masks)

    def call(self, function: Callable[..., object], *args: object) -> None:
        function(*args)

    def send(self, message: object) -> None:
        self.log.append(type(message).__name__)

    def send_now(self, message: object) -> None:
        if isinstance(message, Summary):
            self.summaries.append(message)

    def deliver(self, deltas: list[TokenDelta], load: Load) -> None:
        self.log += [("told", delta.start, delta.finish_reason) for delta in deltas]

    def close(self, stream_id: int) -> None:
        self.log.append(("closed", stream_id))

    def run(self, *, lookahead: bool) -> None:
        settings = EngineSettings(
            max_running_sequences=4,
            token_budget=64,
            max_step_s=1.0,
            max_waiting_requests=4,
            max_waiting_tokens=100,
            block_size=4,
            num_total_blocks=64,
            max_model_len=100,
            eos_token_ids=(0,),
            lookahead=lookahead,
        )
        loop = EngineLoop(
            engine=Engine(self, settings),
            inbox=self.inbox,
            streams=cast(TokenStreams, self),
            control=cast(ControlLink, self),
        )
        with pytest.raises(NothingLeftError):
            loop.run()


def test_a_step_s_tokens_are_told_while_the_next_one_runs() -> None:
    world = World(lambda world, number: None)
    world.inbox.put(Add(generate_request(1, [5, 6], max_tokens=3)))
    world.run(lookahead=False)

    assert world.log == [
        "Admitted",
        ("start", 0),
        "sample",
        ("start", 1),
        ("told", 0, None),
        "sample",
        ("start", 2),
        ("told", 1, None),
        "sample",
        ("told", 2, "length"),
        ("closed", 1),
    ]


def test_with_lookahead_the_next_step_is_started_before_a_step_s_tokens_are_known() -> None:
    world = World(lambda world, number: None)
    world.inbox.put(Add(generate_request(1, [5, 6], max_tokens=3)))
    world.run(lookahead=True)

    assert world.log == [
        "Admitted",
        ("start", 0),
        "sample",
        ("start", 1),
        "sample",
        ("start", 2),
        ("told", 0, None),
        "sample",
        ("told", 1, None),
        ("told", 2, "length"),
        ("closed", 1),
    ]


@pytest.mark.parametrize("lookahead", [False, True])
def test_orders_are_taken_while_a_step_runs_and_an_abort_ends_it_all(lookahead: bool) -> None:
    def abort_in_the_third(world: World, number: int) -> None:
        if number == 3:
            world.inbox.put(Drop(1))

    world = World(abort_in_the_third)
    world.inbox.put(Add(generate_request(1, [5, 6], max_tokens=50)))
    world.run(lookahead=lookahead)

    assert world.summaries[0].finish_reasons == ["abort"]
    assert sum(entry == "sample" for entry in world.log) == 3
    assert [entry for entry in world.log if entry[0] == "told"][-1][2] == "abort"


@pytest.mark.parametrize("lookahead", [False, True])
def test_what_comes_while_a_step_runs_is_in_the_next_one(lookahead: bool) -> None:
    def add_in_the_first(world: World, number: int) -> None:
        if number == 1:
            world.inbox.put(Add(generate_request(2, [7, 8], max_tokens=1)))

    world = World(add_in_the_first)
    world.inbox.put(Add(generate_request(1, [5, 6], max_tokens=50)))
    world.run(lookahead=lookahead)

    assert world.summaries[0].stream_id == 2
    starts = [entry for entry in world.log if entry[0] == "start"]
    assert world.log.index("Admitted", 1) < world.log.index(starts[1])


@pytest.mark.parametrize("lookahead", [False, True])
def test_an_idle_engine_sleeps_and_finishes_every_step_first(lookahead: bool) -> None:
    class Waking(Inbox[Add | Drop]):
        num_waits = 0

        def wait(self) -> None:
            self.num_waits += 1
            if self.num_waits == 1:
                self.put(Add(generate_request(1, [5, 6], max_tokens=8)))
            elif self.num_waits == 2:
                self.put(Drop(7))
            else:
                raise NothingLeftError

    world = World(lambda world, number: None)
    world.inbox = inbox = Waking()
    world.run(lookahead=lookahead)

    assert inbox.num_waits == 3
    assert sum(entry == "sample" for entry in world.log) == 8
    assert world.summaries[0].finish_reasons == ["length"]
