import os
import sys
from pathlib import Path

import psutil
import pytest

from scripts.bench.contender import Contender, ContenderError, ContenderSpec
from scripts.bench.peers.protocol import Run, Stopwatch

# Two processes, one of which never rests; the other answers with its prompts.
_ENGINE = """
import subprocess, sys, time
from scripts.bench.peers.protocol import Facts, Stopwatch, answer, claim_answers
class Echo:
    def facts(self):
        return Facts("echo", "1", 1, "none")
    def generate(self, prompts, num_tokens):
        print("this is no answer")
        if not prompts:
            raise SystemExit("a prompt is missing")
        watch = Stopwatch(len(prompts))
        for number in range(num_tokens):
            for index, prompt in enumerate(prompts):
                watch.take(index, [prompt[number]])
            watch.end_step()
        return watch.run()
answers = claim_answers()
subprocess.Popen([sys.executable, "-c", "while True: pass"])
answer(Echo(), answers)
"""


@pytest.fixture
def contender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Contender:
    (tmp_path / "echo_engine.py").write_text(_ENGINE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    spec = ContenderSpec("echo", Path(sys.executable), "echo_engine", ())
    return Contender(spec, tmp_path / "log")


def test_what_an_engine_prints_is_no_answer(contender: Contender) -> None:
    try:
        run, _ = contender.ask([[1, 2], [3, 4]], 2)
        assert run.token_ids == [[1, 2], [3, 4]]
        assert run.num_rest_tokens == 2
    finally:
        contender.close()


def test_all_processes_of_an_engine_are_frozen_between_orders(contender: Contender) -> None:
    process = psutil.Process(contender.pid)
    try:
        contender.ask([[1]], 1)
        (busy,) = process.children()
        # The signal was sent; the system may take a moment. Never: the test's time-out.
        while {process.status(), busy.status()} != {psutil.STATUS_STOPPED}:
            os.sched_yield()
    finally:
        contender.close()
    _, alive = psutil.wait_procs([busy], timeout=60)
    assert not alive


def test_end_of_an_engine_is_an_error_with_its_last_words_and_nothing_runs_on(
    contender: Contender,
) -> None:
    (busy,) = psutil.Process(contender.pid).children()
    try:
        with pytest.raises(ContenderError, match="a prompt is missing"):
            contender.ask([], 1)
        _, alive = psutil.wait_procs([busy], timeout=60)
        assert not alive
    finally:
        contender.close()


def timed(steps: list[set[int]], num_prompts: int = 2) -> Run:
    """What a watch says of steps of a second each, that give these prompts a token."""
    seconds = iter(map(float, range(100)))
    watch = Stopwatch(num_prompts, clock=lambda: next(seconds))
    for prompts in steps:
        for index in prompts:
            watch.take(index, [1])
        watch.end_step()
    return watch.run()


def test_first_tokens_of_all_prompts_end_the_prefill() -> None:
    run = timed([{0}, {0, 1}, {0, 1}, {0, 1}])
    assert (run.first_s, run.rest_s, run.num_rest_tokens) == (2.0, 2.0, 4)


def test_steps_with_fewer_rows_than_prompts_are_no_part_of_the_rest() -> None:
    run = timed([{0}, {0, 1}, {0, 1}, {1}, {1}])
    assert (run.rest_s, run.num_rest_tokens) == (1.0, 2)
    assert list(map(len, run.token_ids)) == [3, 4]


def test_prompts_that_never_decode_at_once_have_no_rest() -> None:
    run = timed([{0}, {0}, {1}, {1}])
    assert (run.first_s, run.rest_s, run.num_rest_tokens) == (3.0, 0.0, 0)
