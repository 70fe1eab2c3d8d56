"""The two generating operations: a body's JSON in, everything needed to run and write it out.

Plain synchronous functions: for a long body the endpoint runs them in a thread. Past here the
request is valid; what may still fail is ours (`ServiceError`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serve.errors import InvalidRequestError
from serve.messages import GenerateRequest, Prompt, SamplingParams

from .answer import Answer
from .choice import Choice
from .prompts import encode_chat_prompt, encode_completion_prompts
from .sampling import parse_stops, resolve_max_tokens, resolve_sampling
from .schema import ChatCompletionRequest, CompletionRequest, GenerationFields
from .served_model import ServedModel, ServedModels
from .validation import invalid, validate
from .wire import ChatWire, CompletionWire, Envelope, Wire

MAX_TOTAL_CHOICES = 256
_COMPLETION_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Prepared:
    """A valid request and how its answer is written."""

    request: GenerateRequest
    answer: Answer
    is_stream: bool


Prepare = Callable[[dict[str, Any], ServedModels], Prepared]


def prepare_completion(value: dict[str, Any], models: ServedModels) -> Prepared:
    """`POST /v1/completions`.

    Raises:
        RequestError: the request cannot be served as it is.
    """
    fields = validate(CompletionRequest, value)
    model = models.resolve(fields.model)
    _check_completion(fields)
    prompts = encode_completion_prompts(fields.prompt, model)
    max_tokens = resolve_max_tokens(
        fields.max_tokens,
        model,
        num_prompt_tokens=_longest(prompts),
        default=_COMPLETION_MAX_TOKENS,
    )
    sampling = resolve_sampling(fields, model, max_tokens=max_tokens, logprobs=fields.logprobs)
    num_choices = _num_choices(fields, prompts)
    prefixes: list[str] = []
    if fields.echo:
        n = fields.n or 1
        texts = [model.tokenizer.decode(prompt.token_ids) for prompt in prompts]
        prefixes = [texts[index // n] for index in range(num_choices)]
    envelope = _envelope("cmpl", "text_completion", model)
    wire = CompletionWire(
        envelope,
        num_choices=num_choices,
        has_usage=_has_usage(fields),
        token_content=model.tokenizer.token_content,
        prefixes=prefixes,
    )
    return _prepared(fields, model, prompts, sampling, wire=wire, request_id=envelope.id)


def prepare_chat(value: dict[str, Any], models: ServedModels) -> Prepared:
    """`POST /v1/chat/completions`.

    Raises:
        RequestError: the request cannot be served as it is.
    """
    fields = validate(ChatCompletionRequest, value)
    model = models.resolve(fields.model)
    _check_chat(fields)
    prompts = [encode_chat_prompt(fields, model)]
    asked = fields.max_completion_tokens
    max_tokens = resolve_max_tokens(
        fields.max_tokens if asked is None else asked,
        model,
        num_prompt_tokens=_longest(prompts),
        default=None,
    )
    logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
    sampling = resolve_sampling(fields, model, max_tokens=max_tokens, logprobs=logprobs)
    envelope = _envelope("chatcmpl", "chat.completion", model)
    wire = ChatWire(
        envelope,
        num_choices=_num_choices(fields, prompts),
        has_usage=_has_usage(fields),
        token_content=model.tokenizer.token_content,
    )
    return _prepared(fields, model, prompts, sampling, wire=wire, request_id=envelope.id)


def _prepared(
    fields: GenerationFields,
    model: ServedModel,
    prompts: list[Prompt],
    sampling: SamplingParams,
    *,
    wire: Wire,
    request_id: str,
) -> Prepared:
    options = fields.stream_options
    stops = parse_stops(fields.stop)
    end_ids = model.tokenizer.eos_ids | frozenset(sampling.stop_token_ids)
    choices = [
        Choice(index, token_bytes=model.tokenizer.token_bytes, stops=stops, end_ids=end_ids)
        for index in range(_num_choices(fields, prompts))
    ]
    request = GenerateRequest(
        request_id=request_id,
        model=model.name,
        prompts=prompts,
        sampling=sampling,
        n=fields.n or 1,
    )
    answer = Answer(
        wire,
        choices,
        num_prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts),
        has_logprobs=sampling.logprobs is not None,
        has_usage=_has_usage(fields),
        has_continuous_usage=bool(options is not None and options.continuous_usage_stats),
    )
    return Prepared(request, answer, bool(fields.stream))


def _check_completion(fields: CompletionRequest) -> None:
    _check_stream_options(fields)
    n = fields.n or 1
    if fields.best_of is not None and fields.best_of != n:
        raise invalid("best_of", f"must equal n ({n})", fields.best_of)
    if fields.suffix:
        raise InvalidRequestError("suffix is not supported", param="suffix")
    if fields.echo and fields.logprobs is not None:
        raise InvalidRequestError(
            "echo with logprobs (logprobs of the prompt) is not supported yet", param="echo"
        )


def _check_chat(fields: ChatCompletionRequest) -> None:
    _check_stream_options(fields)
    if fields.top_logprobs is not None and not fields.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    if fields.tool_choice not in (None, "auto", "none"):
        rule = "must be auto or none (required and named are not supported yet)"
        raise invalid("tool_choice", rule, fields.tool_choice)
    if set(fields.modalities or []) - {"text"}:
        raise InvalidRequestError("modalities must be [text]", param="modalities")
    if fields.functions:
        raise InvalidRequestError("functions is not supported: use tools", param="functions")


def _check_stream_options(fields: GenerationFields) -> None:
    if fields.stream_options is not None and not fields.stream:
        raise InvalidRequestError("stream_options needs stream: true", param="stream_options")


def _num_choices(fields: GenerationFields, prompts: list[Prompt]) -> int:
    num_choices = len(prompts) * (fields.n or 1)
    if num_choices > MAX_TOTAL_CHOICES:
        raise invalid("n", f"times prompts must be <= {MAX_TOTAL_CHOICES}", num_choices)
    return num_choices


def _has_usage(fields: GenerationFields) -> bool:
    return bool(fields.stream and fields.stream_options and fields.stream_options.include_usage)


def _longest(prompts: list[Prompt]) -> int:
    return max(len(prompt.token_ids) for prompt in prompts)


def _envelope(prefix: str, kind: str, model: ServedModel) -> Envelope:
    return Envelope(
        id=f"{prefix}-{secrets.token_hex(16)}",
        object=kind,
        created=int(time.time()),
        model=model.name,
        system_fingerprint=model.fingerprint,
    )
