"""The heartbeat of a replica: admit requests, run steps, end every request exactly once.

Not thread-safe and not a loop: one thread calls it, between steps, and sends what it returns. It
never waits for anything but the runner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from serve.errors import ErrorInfo, InternalError, InvalidRequestError, PoisonedRequestError
from serve.messages import (
    FinishReason,
    GenerateRequest,
    Load,
    SampledToken,
    StepInput,
    StepOutput,
    Summary,
    TokenDelta,
)

from .admission import Admission
from .grammar import GrammarCompiler, GrammarError
from .scheduler import Schedule, Scheduler
from .sequence import Sequence
from .settings import EngineSettings


class Runner(Protocol):
    """What runs a step on the model."""

    def execute(self, step: StepInput, masks: Mapping[int, np.ndarray]) -> StepOutput:
        """Run one batch and sample; `masks` are allowed tokens by `seq_id`, uint32 [num_words]."""
        ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step has to tell: new tokens and ends of choices, and requests that are over."""

    deltas: list[TokenDelta]
    summaries: list[Summary]


class _Request:
    """An admitted request until its last choice ends."""

    __slots__ = (
        "admitted_s",
        "error",
        "finish_reasons",
        "num_prompt_tokens",
        "num_unfinished",
        "sequences",
        "ttft_s",
    )

    def __init__(
        self, sequences: list[Sequence], num_prompt_tokens: int, *, admitted_s: float
    ) -> None:
        self.sequences = sequences
        self.num_prompt_tokens = num_prompt_tokens
        self.admitted_s = admitted_s
        self.ttft_s: float | None = None
        self.num_unfinished = len(sequences)
        self.finish_reasons: list[FinishReason] = ["abort"] * len(sequences)
        self.error: ErrorInfo | None = None


class Engine:
    """Requests in, tokens out, one step at a time."""

    def __init__(
        self,
        runner: Runner,
        settings: EngineSettings,
        *,
        grammars: GrammarCompiler | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._settings = settings
        self._clock = clock
        self._admission = Admission(settings, grammars)
        self._scheduler = Scheduler(settings)
        self._requests: dict[int, _Request] = {}
        self._result = StepResult([], [])
        self._num_generation_tokens = 0

    def add(self, request: GenerateRequest) -> None:
        """Admit every sequence of `request`, or none.

        A choice whose earlier output already ended it finishes in the next step, with an empty
        delta.

        Raises:
            OverloadedError: the waiting queue is full; says after how long to retry.
            ContextLengthError: a prompt can never be answered here.
            InvalidRequestError: a prompt is empty, or the grammar cannot be compiled.
        """
        stream_id = request.stream.stream_id
        assert stream_id not in self._requests, "a stream id is used once"
        sequences = self._admission.build(request)
        reasons = [_replay(sequence) for sequence in sequences]
        unfinished = [s for s, reason in zip(sequences, reasons, strict=True) if reason is None]
        if unfinished:
            self._admission.check_bounds(self._scheduler, unfinished)
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in request.prompts)
        self._requests[stream_id] = _Request(sequences, num_prompt_tokens, admitted_s=self._clock())
        for sequence, reason in zip(sequences, reasons, strict=True):
            if reason is None:
                self._scheduler.add(sequence)
            else:
                self._end(sequence, reason)

    def abort(self, stream_id: int) -> None:
        """End a request now; its blocks are free when this returns. Unknown ids are ignored.

        Its unfinished choices end with an empty delta of reason "abort" in the next step.
        """
        request = self._requests.get(stream_id)
        if request is not None:
            self._end_all(request, "abort", None)

    @property
    def has_work(self) -> bool:
        """Whether a step would do or tell anything."""
        return bool(self._requests or self._result.deltas or self._result.summaries)

    def step(self) -> StepResult:
        """Run one step: every scheduled sequence advances, most by one token."""
        schedule = self._scheduler.schedule()
        if schedule is not None:
            output = self._execute(schedule)
            self._postprocess(schedule, output)
        return self._take_result()

    def drop_all(self, error: ErrorInfo) -> StepResult:
        """End every request with `error`, because the runner is lost. The engine is empty after."""
        for request in list(self._requests.values()):
            self._end_all(request, "error", error)
        return self._take_result()

    def load(self) -> Load:
        """How busy the engine is, counted in sequences, and its totals."""
        scheduler = self._scheduler
        return Load(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_waiting_tokens=scheduler.num_waiting_tokens,
            num_used_blocks=scheduler.blocks.num_used_blocks,
            num_total_blocks=scheduler.blocks.num_total_blocks,
            num_prompt_tokens_total=scheduler.num_prompt_tokens_total,
            num_generation_tokens_total=self._num_generation_tokens,
            num_preemptions_total=scheduler.num_preemptions_total,
            num_steps_total=scheduler.num_steps_total,
        )

    def check_integrity(self) -> None:
        """Assert every invariant of requests, queue and blocks."""
        self._scheduler.check_integrity()
        scheduled = {*self._scheduler.running, *self._scheduler.waiting}
        num_unfinished = sum(request.num_unfinished for request in self._requests.values())
        assert num_unfinished == len(scheduled), "a sequence is lost or belongs to no request"
        assert all(request.num_unfinished > 0 for request in self._requests.values())

    def _execute(self, schedule: Schedule) -> StepOutput:
        masks = {}
        for sequence in schedule.sampled:
            if sequence.matcher is not None:
                sequence.matcher.watch(sequence.num_left_tokens)
                masks[sequence.seq_id] = sequence.matcher.mask()
        started_s = self._clock()
        output = self._runner.execute(schedule.step, masks)
        self._scheduler.budget.observe(
            schedule.num_tokens,
            num_decode_tokens=schedule.num_decode_tokens,
            duration_s=self._clock() - started_s,
        )
        return output

    def _postprocess(self, schedule: Schedule, output: StepOutput) -> None:
        for sequence, token in zip(schedule.sampled, output.tokens, strict=True):
            assert token.seq_id == sequence.seq_id
            if token.error is not None:
                self._end(sequence, "error", PoisonedRequestError(token.error).info())
                continue
            try:
                reason = sequence.append(token.token_id)
            except GrammarError as exc:
                sequence.token_ids.pop()
                self._end(sequence, "error", InternalError(str(exc)).info())
                continue
            self._num_generation_tokens += 1
            self._tell(sequence, token, reason)

    def _tell(self, sequence: Sequence, token: SampledToken, reason: FinishReason | None) -> None:
        logprobs = None if token.logprobs is None else [token.logprobs]
        position = sequence.num_output_tokens - 1
        if position == 0:
            self._note_first_token(self._requests[sequence.stream_id])
        self._result.deltas.append(
            TokenDelta(
                sequence.stream_id,
                sequence.index,
                position,
                [token.token_id],
                logprobs,
                reason,
            )
        )
        if reason is not None:
            self._finish(sequence, reason, None)

    def _note_first_token(self, request: _Request) -> None:
        if request.ttft_s is None:
            request.ttft_s = self._clock() - request.admitted_s

    def _end(
        self, sequence: Sequence, reason: FinishReason, error: ErrorInfo | None = None
    ) -> None:
        """End a sequence with an empty delta."""
        start = sequence.num_output_tokens
        delta = TokenDelta(sequence.stream_id, sequence.index, start, [], None, reason, error)
        self._result.deltas.append(delta)
        self._finish(sequence, reason, error)

    def _end_all(self, request: _Request, reason: FinishReason, error: ErrorInfo | None) -> None:
        for sequence in request.sequences:
            if not sequence.is_finished:
                self._end(sequence, reason, error)

    def _finish(self, sequence: Sequence, reason: FinishReason, error: ErrorInfo | None) -> None:
        self._scheduler.remove(sequence)
        request = self._requests[sequence.stream_id]
        request.finish_reasons[sequence.index] = reason
        request.error = request.error or error
        request.num_unfinished -= 1
        if request.num_unfinished == 0:
            del self._requests[sequence.stream_id]
            self._result.summaries.append(
                Summary(
                    sequence.stream_id,
                    request.finish_reasons,
                    request.num_prompt_tokens,
                    sum(one.num_output_tokens for one in request.sequences),
                    request.error,
                    self._clock() - request.admitted_s,
                    request.ttft_s,
                )
            )

    def _take_result(self) -> StepResult:
        result, self._result = self._result, StepResult([], [])
        return result


def _replay(sequence: Sequence) -> FinishReason | None:
    try:
        return sequence.replay()
    except GrammarError as exc:
        raise InvalidRequestError(f"the output so far breaks its grammar: {exc}") from exc
