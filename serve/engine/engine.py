"""The heartbeat of a replica: admit requests, run steps, end every request exactly once.

Not thread-safe and not a loop: one thread calls it, between steps, and sends what it returns. It
never waits for anything but the runner. A step is two calls, so that what the step before it made
is told while it runs::

    CPU          start n | tell n-1, masks n, sample n, wait for n, advance n | start n+1
    lookahead    start n | tell n-2, wait for n-1, advance n-1, masks n, sample n | start n+1

With lookahead (CUDA) the device always has a step to do; a sequence that turns out to be finished
has a row too many in the step that was started meanwhile, and that row is ignored.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from serve.errors import ErrorInfo, InternalError, InvalidRequestError, PoisonedRequestError
from serve.messages import FinishReason, GenerateRequest, Load

from .admission import Admission
from .grammar import GrammarCompiler, GrammarError
from .ledger import Ledger, Made, StepResult
from .protocol import PendingOutput, Runner
from .schedule import Schedule
from .scheduler import Scheduler
from .sequence import Sequence, SequenceState
from .settings import EngineSettings


@dataclass(slots=True)
class _Step:
    """A step in flight; `pending` once it is sampled."""

    schedule: Schedule
    started_s: float
    pending: PendingOutput | None = None


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
        self._has_lookahead = settings.lookahead
        self._clock = clock
        self._admission = Admission(settings, grammars)
        self._scheduler = Scheduler(settings)
        self._ledger = Ledger(clock)
        self._started: _Step | None = None
        self._sampled: _Step | None = None
        self._made: Made | None = None
        self._advanced_s = 0.0
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
        sequences = self._admission.build(request)
        reasons = [_replay(sequence) for sequence in sequences]
        unfinished = [s for s, reason in zip(sequences, reasons, strict=True) if reason is None]
        if unfinished:
            self._admission.check_bounds(self._scheduler, unfinished)
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in request.prompts)
        self._ledger.open(request.stream.stream_id, sequences, num_prompt_tokens)
        _link_siblings(unfinished, request.n)
        for sequence, reason in zip(sequences, reasons, strict=True):
            if reason is None:
                self._scheduler.add(sequence)
            else:
                self._end(sequence, reason, None)

    def abort(self, stream_id: int) -> None:
        """End a request now; its blocks are free when this returns. Unknown ids are ignored.

        Its unfinished choices end with an empty delta of reason "abort" in the next step.
        """
        self._tell()
        for sequence in self._ledger.unfinished(stream_id):
            self._end(sequence, "abort", None)

    @property
    def has_work(self) -> bool:
        """Whether a step would do or tell anything."""
        is_idle = self._started is None and self._sampled is None and self._made is None
        return not (is_idle and self._ledger.is_empty)

    def start_step(self) -> None:
        """Start the next step, if anything can take part in one."""
        assert self._started is None, "a step is started and not finished"
        scheduled = self._scheduler.schedule()
        if scheduled is not None:
            schedule, step = scheduled
            started_s = self._clock()
            self._runner.start(step)
            self._started = _Step(schedule, started_s)

    def take_result(self) -> StepResult:
        """What the steps made that nobody has been told yet; best asked for while a step runs."""
        self._tell()
        return self._ledger.take()

    def finish_step(self) -> None:
        """Sample the step that was started; take its tokens, or with lookahead those before it.

        Raises:
            CollectiveError: the runner is lost, and with it every request.
        """
        self._tell()
        if self._has_lookahead:
            self._advance()
            self._sample()
        else:
            self._sample()
            self._advance()

    def step(self) -> StepResult:
        """Run one step from its start to what it made, for drivers with nothing else to do."""
        self.start_step()
        self.finish_step()
        return self.take_result()

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
            num_cached_blocks=scheduler.blocks.num_cached_blocks,
            num_evicted_blocks_total=scheduler.blocks.num_evicted_total,
            num_cache_query_tokens_total=scheduler.num_cache_query_tokens_total,
            num_cache_hit_tokens_total=scheduler.num_cache_hit_tokens_total,
        )

    def check_integrity(self) -> None:
        """Assert every invariant of requests, queue and blocks."""
        self._scheduler.check_integrity()
        self._ledger.check_integrity([*self._scheduler.running, *self._scheduler.waiting])

    def _sample(self) -> None:
        step, self._started = self._started, None
        if step is not None:
            step.pending = self._runner.sample(_masks(step.schedule))
            self._sampled = step

    def _advance(self) -> None:
        """Wait for the tokens of the sampled step and append them; all else can wait."""
        step, self._sampled = self._sampled, None
        if step is None:
            return
        assert step.pending is not None
        output = step.pending.result()
        self._observe(step)
        scheduler, block_size = self._scheduler, self._scheduler.blocks.block_size
        for sequence, num_computed in step.schedule.computed:
            if sequence.state is SequenceState.RUNNING:
                scheduler.publish(sequence, num_computed)
        rows = step.schedule.rows
        made = self._made = Made(rows, output, self._advanced_s)
        errors, running = output.errors, SequenceState.RUNNING
        for row, (sequence, token_id) in enumerate(zip(rows, output.token_ids, strict=True)):
            if sequence.state is not running or row in errors:
                self._advance_odd(made, row)
                continue
            token_ids = sequence.token_ids
            if len(token_ids) % block_size == 0:
                scheduler.publish(sequence, len(token_ids))
            token_ids.append(token_id)
            if (
                token_id in sequence.stop_ids
                or len(token_ids) >= sequence.max_len
                or sequence.matcher is not None
            ):
                self._judge(made, row)
        self._num_generation_tokens += len(rows) - len(made.void)

    def _advance_odd(self, made: Made, row: int) -> None:
        """A row that failed, or whose sequence was aborted, finished or preempted meanwhile."""
        sequence = made.rows[row]
        message = made.output.errors.get(row)
        if sequence.is_finished:
            made.void.add(row)
        elif message is not None:
            self._fail(made, row, PoisonedRequestError(message).info())
        else:
            self._scheduler.append_waiting(sequence, made.output.token_ids[row])
            self._judge(made, row)

    def _judge(self, made: Made, row: int) -> None:
        """Finish the sequence of `row` if the token just appended was its last."""
        sequence = made.rows[row]
        try:
            reason = sequence.finish_reason_after(sequence.token_ids[-1])
        except GrammarError as exc:
            self._fail(made, row, InternalError(str(exc)).info())
            sequence.token_ids.pop()
            return
        if reason is not None:
            made.ends[row] = (reason, None)
            self._scheduler.remove(sequence)

    def _fail(self, made: Made, row: int, error: ErrorInfo) -> None:
        made.ends[row] = ("error", error)
        self._num_generation_tokens -= 1
        self._scheduler.remove(made.rows[row], is_sound=False)

    def _observe(self, step: _Step) -> None:
        now_s = self._clock()
        self._scheduler.budget.observe(
            step.schedule.num_tokens,
            num_decode_tokens=len(step.schedule.decodes),
            duration_s=now_s - max(step.started_s, self._advanced_s),
        )
        self._advanced_s = now_s

    def _tell(self) -> None:
        made, self._made = self._made, None
        if made is not None:
            self._ledger.tell(made)

    def _end(self, sequence: Sequence, reason: FinishReason, error: ErrorInfo | None) -> None:
        self._scheduler.remove(sequence)
        self._ledger.end(sequence, reason, error)


def _link_siblings(sequences: list[Sequence], n: int) -> None:
    """Let each choice of a prompt wait until the one before it has computed the prompt."""
    for before, sequence in pairwise(sequences):
        if before.index // n == sequence.index // n:
            sequence.sibling = before


def _masks(schedule: Schedule) -> dict[int, np.ndarray]:
    """By slot, what the grammars of a step's sequences allow."""
    masks: dict[int, np.ndarray] = {}
    if not schedule.wants_masks:
        return masks
    for sequence in schedule.rows:
        if sequence.matcher is not None and sequence.state is SequenceState.RUNNING:
            sequence.matcher.watch(sequence.num_left_tokens)
            masks[sequence.slot] = sequence.matcher.mask()
    return masks


def _replay(sequence: Sequence) -> FinishReason | None:
    try:
        return sequence.replay()
    except GrammarError as exc:
        raise InvalidRequestError(f"the output so far breaks its grammar: {exc}") from exc
