"""One request's answer while it arrives: deltas in, the bytes of events or of one body out.

Not the connection: `endpoint` submits, sends and aborts. Stop strings are decided here, so an
answer can be finished while its replica still works on it; then the endpoint aborts the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve.messages import TokenDelta

from .choice import Choice, TokenLogprob
from .wire import DONE, FinishedChoice, Usage, Wire


class Answer:
    """All choices of a request, `num_prompt_tokens` over all its prompts."""

    def __init__(
        self,
        wire: Wire,
        choices: Sequence[Choice],
        *,
        num_prompt_tokens: int,
        has_logprobs: bool,
        has_usage: bool = False,
        has_continuous_usage: bool = False,
    ) -> None:
        self._wire = wire
        self._choices = choices
        self._num_prompt_tokens = num_prompt_tokens
        self._has_logprobs = has_logprobs
        self._has_usage = has_usage
        self._has_continuous_usage = has_continuous_usage
        self._num_unfinished = len(choices)

    @property
    def is_finished(self) -> bool:
        """Whether every choice has its finish reason."""
        return self._num_unfinished == 0

    def stream(self, deltas: Sequence[TokenDelta], events: list[bytes]) -> None:
        """Append the events that `deltas` cause, the end of the stream included.

        Raises:
            ShoalError: a choice failed; `events` holds what came before.
        """
        for delta in deltas:
            choice = self._choices[delta.index]
            if choice.finish_reason is not None:
                continue
            text = choice.take(delta)
            if not choice.is_started:
                choice.is_started = True
                events.append(self._wire.first_event(delta.index))
            logprobs = self._new_logprobs(choice)
            if text or logprobs:
                events.append(
                    self._wire.text_event(delta.index, text, logprobs, self._usage_so_far())
                )
            if choice.finish_reason is not None:
                events.append(self._wire.finish_event(delta.index, choice.finish_reason))
                self._num_unfinished -= 1
        if self._num_unfinished == 0:
            if self._has_usage:
                events.append(self._wire.usage_event(self._usage()))
            events.append(DONE)

    def collect(self, deltas: Sequence[TokenDelta], parts: dict[int, FinishedParts]) -> None:
        """Add what `deltas` say to the parts of each choice.

        Raises:
            ShoalError: a choice failed.
        """
        for delta in deltas:
            choice = self._choices[delta.index]
            if choice.finish_reason is not None:
                continue
            part = parts.setdefault(delta.index, FinishedParts())
            part.texts.append(choice.take(delta))
            part.logprobs += self._new_logprobs(choice) or []
            if choice.finish_reason is not None:
                self._num_unfinished -= 1

    def body(self, parts: dict[int, FinishedParts]) -> bytes:
        """The whole answer, once every choice is finished."""
        finished = []
        for choice in self._choices:
            part = parts[choice.index]
            assert choice.finish_reason is not None
            logprobs = part.logprobs if self._has_logprobs else None
            finished.append(
                FinishedChoice(choice.index, "".join(part.texts), logprobs, choice.finish_reason)
            )
        return self._wire.body(finished, self._usage())

    def _new_logprobs(self, choice: Choice) -> list[TokenLogprob] | None:
        if not self._has_logprobs:
            return None
        new, choice.new_logprobs = choice.new_logprobs, []
        return new

    def _usage_so_far(self) -> Usage | None:
        return self._usage() if self._has_continuous_usage else None

    def _usage(self) -> Usage:
        num_completion_tokens = sum(choice.num_tokens for choice in self._choices)
        num_cached_tokens = sum(choice.num_cached_tokens for choice in self._choices)
        return Usage.of(
            self._num_prompt_tokens, num_completion_tokens, num_cached_tokens=num_cached_tokens
        )


class FinishedParts:
    """What a choice has said so far, for an answer in one piece."""

    __slots__ = ("logprobs", "texts")

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.logprobs: list[TokenLogprob] = []
