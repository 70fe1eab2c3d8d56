"""Short ways to write a request and to run an engine until it is empty."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from serve.engine.engine import Engine
from serve.engine.ledger import StepResult
from serve.errors import ErrorInfo
from serve.messages import (
    FinishReason,
    GenerateRequest,
    Prompt,
    SamplingParams,
    StreamAddress,
    Summary,
    TokenDelta,
    TopLogprobs,
)


def generate_request(
    stream_id: int,
    *prompts: list[int],
    n: int = 1,
    output_token_ids: list[list[int]] | None = None,
    namespace: bytes = b"",
    **sampling: Any,
) -> GenerateRequest:
    """A request for `prompts`; `sampling` are fields of `SamplingParams` (seed 0, 8 tokens)."""
    return GenerateRequest(
        request_id=f"r{stream_id}",
        model="m",
        prompts=[Prompt(prompt, [], output_token_ids or []) for prompt in prompts],
        sampling=SamplingParams(**{"seed": 0, "max_tokens": 8, **sampling}),
        n=n,
        namespace=namespace,
        stream=StreamAddress("", b"", stream_id),
    )


@dataclass(slots=True)
class Choice:
    """What one choice of one stream received."""

    start: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TopLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: ErrorInfo | None = None
    num_cached_tokens: int = field(default=0, compare=False)


class Receiver:
    """Collects deltas; asserts that each continues its choice and that each choice ends once."""

    def __init__(self) -> None:
        self.choices: dict[tuple[int, int], Choice] = {}
        self.summaries: dict[int, Summary] = {}

    def take(self, result: StepResult) -> None:
        """Take what one step told."""
        for delta in result.deltas:
            self._take_delta(delta)
        for summary in result.summaries:
            assert summary.stream_id not in self.summaries, "a request ended twice"
            self.summaries[summary.stream_id] = summary
            for index, reason in enumerate(summary.finish_reasons):
                assert self.choices[summary.stream_id, index].finish_reason == reason

    def _take_delta(self, delta: TokenDelta) -> None:
        choice = self.choices.setdefault((delta.stream_id, delta.index), Choice(delta.start))
        assert choice.finish_reason is None, "a choice went on after its end"
        assert delta.start == choice.start + len(choice.token_ids), "tokens are missing"
        choice.token_ids += delta.token_ids
        choice.num_cached_tokens += delta.num_cached_tokens
        choice.logprobs += delta.logprobs or []
        choice.finish_reason = delta.finish_reason
        choice.error = delta.error


def run(
    engine: Engine, requests: Iterable[GenerateRequest] = (), *, max_steps: int = 100_000
) -> Receiver:
    """Add `requests` and step until the engine is empty, checking its integrity each time."""
    receiver = Receiver()
    for request in requests:
        engine.add(request)
    for _ in range(max_steps):
        if not engine.has_work:
            return receiver
        receiver.take(engine.step())
        engine.check_integrity()
    raise AssertionError(f"not empty after {max_steps} steps")
