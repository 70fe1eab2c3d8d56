"""A dispatcher without replicas: it admits, and speaks tokens from a script on the event loop.

Not a mock: it obeys the contract of `serve.ingress.stream` (one finish a choice, deltas in any
interleaving, abort at any time), so what holds over it holds over the real one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from serve.errors import ShoalError
from serve.ingress.stream import TokenStream
from serve.messages import (
    FinishReason,
    GenerateRequest,
    Load,
    ReplicaStats,
    TokenDelta,
    TopLogprobs,
)

Script = Callable[[GenerateRequest, int], list[int]]


def echo(request: GenerateRequest, index: int) -> list[int]:
    """The script that answers every choice with its own prompt."""
    return list(request.prompts[index // request.n].token_ids)


class EchoDispatcher:
    """Answers choice `index` of a request with the tokens `script(request, index)`.

    A script that ends before `max_tokens` ends with finish reason "stop", else "length". Set
    `refusal` to refuse what follows, `failure` to end streams after `failure_after_steps`; clear
    `may_admit` to admit nothing for a while. Of each prompt `num_cached_tokens` are said to be
    cached. `requests` are those that came, `left` the ids of
    those whose client left (aborted, or cancelled before admission).
    """

    def __init__(
        self,
        *,
        script: Script = echo,
        models: Sequence[str] = ("echo",),
        step_s: float = 0.0,
        tokens_per_step: int = 1,
    ) -> None:
        self.script = script
        self.step_s = step_s
        self.tokens_per_step = tokens_per_step
        self.refusal: ShoalError | None = None
        self.failure: ShoalError | None = None
        self.failure_after_steps = 0
        self.num_cached_tokens = 0
        self.ready_models = set(models)
        self.may_admit = asyncio.Event()
        self.may_admit.set()
        self.requests: list[GenerateRequest] = []
        self.left: asyncio.Queue[str] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0

    @property
    def num_running(self) -> int:
        """Requests that still speak."""
        return len(self._tasks)

    async def settle(self) -> None:
        """Wait until nobody speaks any more: an answer is complete a moment before that."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def submit(self, request: GenerateRequest) -> TokenStream:
        """Admit `request`, or raise `refusal`; see `serve.ingress.stream.Dispatcher`."""
        self.requests.append(request)
        try:
            await self.may_admit.wait()
        except asyncio.CancelledError:
            self.left.put_nowait(request.request_id)
            raise
        if self.refusal is not None:
            raise self.refusal
        self._num_prompt_tokens += sum(len(prompt.token_ids) for prompt in request.prompts)
        stream = TokenStream(
            num_choices=len(request.prompts) * request.n,
            replica_id="echo#0",
            on_abort=lambda: self._abort(request.request_id, task),
        )
        task = asyncio.get_running_loop().create_task(self._speak(request, stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    def has_ready_replica(self, model: str) -> bool:
        """Whether `model` is in `ready_models`."""
        return model in self.ready_models

    async def stats(self) -> list[ReplicaStats]:
        """One replica a ready model, with what this dispatcher did so far."""
        load = Load(
            num_running=self.num_running,
            num_total_blocks=1,
            num_prompt_tokens_total=self._num_prompt_tokens,
            num_generation_tokens_total=self._num_generated_tokens,
        )
        return [
            ReplicaStats(model=model, replica_id="echo#0", is_ready=True, load=load)
            for model in sorted(self.ready_models)
        ]

    def _abort(self, request_id: str, task: asyncio.Task[None]) -> None:
        self.left.put_nowait(request_id)
        task.cancel()

    async def _speak(self, request: GenerateRequest, stream: TokenStream) -> None:
        max_tokens = request.sampling.max_tokens
        scripts = [self.script(request, index) for index in range(stream.num_choices)]
        num_steps = 0
        start = 0
        while not stream.is_over:
            await asyncio.sleep(self.step_s)
            if self.failure is not None and num_steps >= self.failure_after_steps:
                stream.fail(self.failure)
                return
            for index, script in enumerate(scripts):
                if start < max(1, min(len(script), max_tokens)):
                    stream.feed(self._delta(request, script, index, start))
            start += self.tokens_per_step
            num_steps += 1

    def _delta(
        self, request: GenerateRequest, script: list[int], index: int, start: int
    ) -> TokenDelta:
        max_tokens = request.sampling.max_tokens
        end = min(start + self.tokens_per_step, max_tokens)
        token_ids = script[start:end]
        self._num_generated_tokens += len(token_ids)
        reason: FinishReason | None = None
        if end >= len(script):
            reason = "stop" if len(script) < max_tokens else "length"
        elif end >= max_tokens:
            reason = "length"
        logprobs = None
        if request.sampling.logprobs is not None:
            logprobs = [_logprobs(token_id, request.sampling.logprobs) for token_id in token_ids]
        is_first = start == 0 and index % request.n == 0
        return TokenDelta(
            request.stream.stream_id,
            index,
            start,
            token_ids,
            logprobs,
            reason,
            num_cached_tokens=self.num_cached_tokens if is_first else 0,
        )


def _logprobs(token_id: int, count: int) -> TopLogprobs:
    """Made up: the token itself is the likeliest, the ids from 0 on follow."""
    others = [other for other in range(count) if other != token_id]
    ids = [token_id, *others][:count]
    return TopLogprobs(-0.25, ids, [-0.25 - rank for rank in range(len(ids))])
