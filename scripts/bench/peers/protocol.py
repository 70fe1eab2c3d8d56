"""What a benchmark asks of an engine, and the loop of the process that answers.

Only the standard library: it is imported by every engine's own Python. The one decision: one order
is enough. Prompts of equal length go in together, tokens come out greedily and never end early; the
time to all first tokens is a prefill's, the steps after it in which every prompt gets a token are
decoding's. An engine that starts its prompts one after another ends them so too: those last steps
have fewer rows, and do not count.

A line of JSON each way; whatever else an engine prints goes to standard error::

    order   {"prompts": [[...], ...], "num_tokens": n}
    answer  {"first_s": s, "rest_s": s, "num_rest_tokens": n, "token_ids": [[...], ...]}
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Protocol


@dataclass
class Run:
    """One order's times, in seconds; `num_rest_tokens`, of all prompts, came in `rest_s`.

    Both are 0 where no step after the first tokens had one for every prompt.
    """

    first_s: float
    rest_s: float
    num_rest_tokens: int
    token_ids: list[list[int]]


@dataclass
class Facts:
    """What an engine is: said once, before the first order."""

    name: str
    version: str
    num_threads: int
    dtype: str
    notes: list[str] = field(default_factory=list)


class Engine(Protocol):
    """One engine with its model loaded."""

    def facts(self) -> Facts:
        """What it is."""
        ...

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Run:
        """`num_tokens` tokens after each prompt."""
        ...


class Stopwatch:
    """Takes tokens as steps give them; times the first ones, and the steps that all prompts share.

    `clock` is in seconds.
    """

    def __init__(self, num_prompts: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.token_ids: list[list[int]] = [[] for _ in range(num_prompts)]
        self._clock = clock
        self._began_s = self._last_s = clock()
        self._first_s: float | None = None
        self._num_rest_tokens = 0
        self._is_over = False
        self._step: dict[int, int] = {}  # tokens of this step, by prompt

    def take(self, index: int, token_ids: list[int]) -> None:
        """New tokens of prompt `index`."""
        self.token_ids[index] += token_ids
        if token_ids:
            self._step[index] = self._step.get(index, 0) + len(token_ids)

    def end_step(self) -> None:
        """A step is over: its tokens were taken."""
        now_s = self._clock()
        step, self._step = self._step, {}
        if self._first_s is None:
            if all(self.token_ids):
                self._first_s = self._last_s = now_s
        elif len(step) < len(self.token_ids):
            self._is_over = True
        elif not self._is_over:
            self._last_s = now_s
            self._num_rest_tokens += sum(step.values())

    def run(self) -> Run:
        """What was measured, once every prompt has at least one token."""
        assert self._first_s is not None, "a prompt got no token"
        return Run(
            first_s=self._first_s - self._began_s,
            rest_s=self._last_s - self._first_s,
            num_rest_tokens=self._num_rest_tokens,
            token_ids=self.token_ids,
        )


def claim_answers() -> int:
    """A descriptor of standard output for answers alone; prints go to standard error."""
    answers = os.dup(1)
    os.dup2(2, 1)
    return answers


def answer(engine: Engine, answers: int) -> None:
    """Say what `engine` is, then answer orders until standard input ends."""
    _say(answers, asdict(engine.facts()))
    for line in sys.stdin:
        order = json.loads(line)
        _say(answers, asdict(engine.generate(order["prompts"], order["num_tokens"])))


def _say(answers: int, content: dict[str, object]) -> None:
    text = memoryview(json.dumps(content).encode() + b"\n")
    while text:
        text = text[os.write(answers, text) :]
