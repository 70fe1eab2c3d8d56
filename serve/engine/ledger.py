"""Who asked for what, and what they have been told: deltas and summaries out of sampled rows.

Not the engine: nothing here decides what runs next, so all of it happens while a step runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from serve.errors import ErrorInfo
from serve.messages import FinishReason, StepOutput, Summary, TokenDelta

from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class StepResult:
    """What there is to tell: new tokens and ends of choices, and requests that are over."""

    deltas: list[TokenDelta]
    summaries: list[Summary]


@dataclass(slots=True)
class Made:
    """What a step made: a token for each of `rows`, but for those that are `void`.

    `ends` are the rows whose sequence is finished; one with an error made no token. The rows'
    sequences are as the step left them until the next one's tokens are appended.
    """

    rows: list[Sequence]
    output: StepOutput
    at_s: float
    void: set[int] = field(default_factory=set)
    ends: dict[int, tuple[FinishReason, ErrorInfo | None]] = field(default_factory=dict)


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


class Ledger:
    """Open requests by stream id, and what nobody has been told yet."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._requests: dict[int, _Request] = {}
        self._deltas: list[TokenDelta] = []
        self._summaries: list[Summary] = []

    @property
    def is_empty(self) -> bool:
        """Whether no request is open and nothing is left to tell."""
        return not (self._requests or self._deltas or self._summaries)

    def open(self, stream_id: int, sequences: list[Sequence], num_prompt_tokens: int) -> None:
        """A request was admitted as `sequences`, one a choice."""
        assert stream_id not in self._requests, "a stream id is used once"
        admitted_s = self._clock()
        self._requests[stream_id] = _Request(sequences, num_prompt_tokens, admitted_s=admitted_s)

    def unfinished(self, stream_id: int) -> list[Sequence]:
        """Sequences of a request that go on; none where the id is unknown."""
        request = self._requests.get(stream_id)
        sequences = [] if request is None else request.sequences
        return [sequence for sequence in sequences if not sequence.is_finished]

    def tell(self, made: Made) -> None:
        """One delta for each row that has a token or an end."""
        token_ids, logprobs = made.output.token_ids, made.output.logprobs
        for row, sequence in enumerate(made.rows):
            if row in made.void:
                continue
            reason, error = made.ends.get(row, (None, None))
            if error is not None:
                self.end(sequence, "error", error)
                continue
            position = sequence.num_output_tokens - 1
            num_cached_tokens = 0
            if position == 0:
                num_cached_tokens = sequence.num_cached_tokens
                self._note_first_token(self._requests[sequence.stream_id], made.at_s)
            self._deltas.append(
                TokenDelta(
                    sequence.stream_id,
                    sequence.index,
                    position,
                    [token_ids[row]],
                    [logprobs[row]] if row in logprobs else None,
                    reason,
                    num_cached_tokens=num_cached_tokens,
                )
            )
            if reason is not None:
                self._finish(sequence, reason, None)

    def end(self, sequence: Sequence, reason: FinishReason, error: ErrorInfo | None) -> None:
        """A sequence is over without another token: an empty delta."""
        start = sequence.num_output_tokens
        delta = TokenDelta(sequence.stream_id, sequence.index, start, [], None, reason, error)
        self._deltas.append(delta)
        self._finish(sequence, reason, error)

    def take(self) -> StepResult:
        """What there is to tell since the last call."""
        result = StepResult(self._deltas, self._summaries)
        self._deltas, self._summaries = [], []
        return result

    def check_integrity(self, scheduled: Iterable[Sequence]) -> None:
        """Assert that the sequences which go on are exactly those that are `scheduled`."""
        known = {s for request in self._requests.values() for s in request.sequences}
        assert {s for s in known if not s.is_finished} == set(scheduled), "a sequence is lost"

    def _note_first_token(self, request: _Request, at_s: float) -> None:
        if request.ttft_s is None:
            request.ttft_s = at_s - request.admitted_s

    def _finish(self, sequence: Sequence, reason: FinishReason, error: ErrorInfo | None) -> None:
        request = self._requests[sequence.stream_id]
        request.finish_reasons[sequence.index] = reason
        request.error = request.error or error
        request.num_unfinished -= 1
        if request.num_unfinished == 0:
            del self._requests[sequence.stream_id]
            self._summaries.append(
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
