"""Whether a request is taken, and the sequences it becomes. All of a request or nothing.

Not scheduling: what is admitted waits. The bound is strict and counts only what would really
wait: sequences that the next step can start are not held against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import msgspec

from serve.errors import ContextLengthError, InvalidRequestError, OverloadedError
from serve.messages import GenerateRequest, GrammarSpec, Prompt, SamplingParams
from serve.seeds import choice_seed

from .grammar import GrammarCompiler, Matcher
from .prefix_keys import PrefixKeys
from .scheduler import Scheduler
from .sequence import Sequence
from .settings import EngineSettings

_MAX_RETRY_AFTER_S = 30.0


class Admission:
    """Turns requests into sequences, numbered in order of arrival."""

    def __init__(self, settings: EngineSettings, grammars: GrammarCompiler | None) -> None:
        self._settings = settings
        self._grammars = grammars
        self._num_sequences = 0

    def build(self, request: GenerateRequest) -> list[Sequence]:
        """One sequence for every choice of every prompt, in the order of their indices.

        Raises:
            ContextLengthError: a prompt leaves no room for an answer, or never fits the KV pool.
            InvalidRequestError: a prompt is empty, or the grammar cannot be compiled.
        """
        for prompt in request.prompts:
            _check_prompt(prompt, self._settings)
        params = [
            msgspec.structs.replace(request.sampling, seed=choice_seed(request.sampling.seed, i))
            for i in range(request.n)
        ]
        sequences: list[Sequence] = []
        for prompt in request.prompts:
            keys = self._keys(request, prompt)
            for choice in range(request.n):
                sequence = self._build_one(
                    request, prompt, params[choice], index=len(sequences), keys=keys
                )
                sequences.append(sequence)
        return sequences

    def check_bounds(self, scheduler: Scheduler, sequences: list[Sequence]) -> None:
        """Refuse `sequences` where they would wait and the queue is full.

        Raises:
            OverloadedError: too many requests or tokens would wait.
        """
        left_over = list(_left_over(scheduler, sequences))
        if not left_over or left_over[-1] is not sequences[-1]:
            return
        settings = self._settings
        num_requests = len({sequence.stream_id for sequence in left_over})
        num_tokens = sum(len(sequence.token_ids) for sequence in left_over)
        if num_requests > settings.max_waiting_requests:
            limit = f"max_waiting_requests is {settings.max_waiting_requests}"
            raise self._overloaded(scheduler, f"{limit}, this would be request {num_requests}")
        if num_tokens > settings.max_waiting_tokens:
            limit = f"max_waiting_tokens is {settings.max_waiting_tokens}"
            raise self._overloaded(scheduler, f"{limit}, with this request {num_tokens} would wait")

    def _overloaded(self, scheduler: Scheduler, reason: str) -> OverloadedError:
        rate = scheduler.budget.tokens_per_s
        wait_s = scheduler.num_waiting_tokens / rate if rate > 0 else 0.0
        retry_after_s = float(round(min(max(wait_s, 1.0), _MAX_RETRY_AFTER_S)))
        return OverloadedError(f"The waiting queue is full: {reason}", retry_after_s=retry_after_s)

    def _build_one(
        self,
        request: GenerateRequest,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        index: int,
        keys: PrefixKeys | None,
    ) -> Sequence:
        settings = self._settings
        choice = index % request.n
        sent = prompt.output_token_ids[choice] if prompt.output_token_ids else []
        num_prompt_tokens = len(prompt.token_ids)
        eos_ids = () if sampling.ignore_eos else settings.eos_token_ids
        self._num_sequences += 1
        return Sequence(
            self._num_sequences,
            request.stream.stream_id,
            index=index,
            token_ids=prompt.token_ids + sent,
            num_prompt_tokens=num_prompt_tokens,
            sampling=sampling,
            max_len=min(
                num_prompt_tokens + sampling.max_tokens,
                settings.max_model_len,
                settings.num_slots + 1,  # the last token sampled needs no slot
            ),
            stop_ids=frozenset((*eos_ids, *sampling.stop_token_ids)),
            matcher=self._compile(sampling.grammar),
            keys=None if keys is None else keys.copy(),
        )

    def _keys(self, request: GenerateRequest, prompt: Prompt) -> PrefixKeys | None:
        """Without a cache, only the choices of one prompt share blocks, while they run."""
        namespace = request.namespace
        if not self._settings.prefix_cache:
            if request.n == 1:
                return None
            namespace = request.stream.stream_id.to_bytes(8, "little")
        return PrefixKeys(prompt, namespace=namespace, block_size=self._settings.block_size)

    def _compile(self, spec: GrammarSpec | None) -> Matcher | None:
        if spec is None:
            return None
        if self._grammars is None:
            raise InvalidRequestError(
                f"this model cannot answer with {spec.kind}: it has no grammars",
                param="response_format",
            )
        return self._grammars.compile(spec)


def _check_prompt(prompt: Prompt, settings: EngineSettings) -> None:
    num_tokens = len(prompt.token_ids)
    if num_tokens == 0:
        raise InvalidRequestError("a prompt must have >= 1 token, got 0", param="prompt")
    if num_tokens >= settings.max_model_len:
        raise ContextLengthError(
            f"prompt and answer must have <= {settings.max_model_len} tokens,"
            f" got {num_tokens} in the prompt alone"
        )
    if num_tokens > settings.num_slots:
        raise ContextLengthError(
            f"a prompt must fit the KV cache of {settings.num_slots} tokens, got {num_tokens}"
        )


def _left_over(scheduler: Scheduler, sequences: list[Sequence]) -> Iterator[Sequence]:
    """Those of the waiting sequences and `sequences` that free places and blocks do not hold."""
    num_places = scheduler.max_running_sequences - len(scheduler.running)
    num_blocks = scheduler.blocks.num_available_blocks
    for sequence in chain(scheduler.waiting, sequences):
        num_places -= 1
        num_blocks -= scheduler.blocks.num_blocks_for(len(sequence.token_ids))
        if num_places < 0 or num_blocks < 0:
            yield sequence
