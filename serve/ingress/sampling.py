"""A request's sampling fields and a model's defaults, resolved into `SamplingParams`.

Not the sampler. A field that the request leaves out comes from the checkpoint, else it has OpenAI's
default; a request without a seed gets one here, so that from here on every request is seeded.
"""

from __future__ import annotations

import secrets
from typing import Any

import msgspec

from serve.errors import ContextLengthError, InvalidRequestError
from serve.messages import GrammarSpec, SamplingParams

from .schema import GenerationFields, ResponseFormat
from .served_model import ServedModel
from .validation import invalid, show

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGIT_BIAS = 1024
MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 32
_SEED_MASK = 2**63 - 1


def resolve_sampling(
    request: GenerationFields,
    model: ServedModel,
    *,
    max_tokens: int,
    logprobs: int | None,
) -> SamplingParams:
    """All of how a request's tokens are chosen.

    Raises:
        InvalidRequestError: a value is outside its limit.
    """
    defaults = model.defaults
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise invalid("min_tokens", f"must be <= max_tokens ({max_tokens})", min_tokens)
    seed = secrets.randbits(63) if request.seed is None else request.seed & _SEED_MASK
    return SamplingParams(
        seed=seed,
        max_tokens=max_tokens,
        temperature=_given(request.temperature, defaults.temperature),
        top_p=_given(request.top_p, defaults.top_p),
        top_k=max(0, int(_given(request.top_k, defaults.top_k))),
        min_p=_given(request.min_p, defaults.min_p),
        repetition_penalty=_given(request.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=_given(request.presence_penalty, 0.0),
        frequency_penalty=_given(request.frequency_penalty, 0.0),
        logit_bias=parse_logit_bias(request.logit_bias, model.tokenizer.num_real_tokens),
        min_tokens=min_tokens,
        stop_token_ids=_parse_stop_token_ids(request, model),
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
        grammar=parse_response_format(request.response_format),
    )


def resolve_max_tokens(
    asked: int | None, model: ServedModel, *, num_prompt_tokens: int, default: int | None
) -> int:
    """Most tokens of an answer to the longest prompt; without a `default` what the context leaves.

    As OpenAI does, an answer that was asked for and does not fit is an error, not cut short.

    Raises:
        ContextLengthError: prompt and answer do not fit the model's context.
        InvalidRequestError: more than the model's `max_answer_tokens`.
    """
    room = model.max_model_len - num_prompt_tokens
    if asked is None:
        return min(default or room, room, model.max_answer_tokens)
    if asked > model.max_answer_tokens:
        raise invalid("max_tokens", f"must be <= {model.max_answer_tokens}", asked)
    if asked > room:
        raise ContextLengthError(
            f"This model's maximum context length is {model.max_model_len} tokens. However, you"
            f" requested {num_prompt_tokens + asked} tokens ({num_prompt_tokens} in the prompt,"
            f" {asked} in the completion).",
            param="max_tokens",
        )
    return asked


def parse_stops(value: Any) -> tuple[str, ...]:
    """`stop`: a string, a list of strings, or nothing; empty strings mean nothing.

    Raises:
        InvalidRequestError: another type, too many or too long.
    """
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise invalid("stop", "must be a string or a list of strings", value)
    if len(stops) > MAX_STOPS:
        raise invalid("stop", f"must have <= {MAX_STOPS} strings", len(stops))
    for index, stop in enumerate(stops):
        if len(stop) > MAX_STOP_CHARS:
            raise invalid(f"stop[{index}]", f"must have <= {MAX_STOP_CHARS} characters", len(stop))
    return tuple(stop for stop in stops if stop)


def parse_logit_bias(value: Any, num_tokens: int) -> dict[int, float]:
    """`logit_bias` by token id.

    Raises:
        InvalidRequestError: too many entries, an id that no token has, a bias out of range.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid("logit_bias", "must be an object", value)
    if len(value) > MAX_LOGIT_BIAS:
        raise invalid("logit_bias", f"must have <= {MAX_LOGIT_BIAS} entries", len(value))
    biases: dict[int, float] = {}
    for key, bias in value.items():
        token_id = int(key) if key.isascii() and key.isdigit() and len(key) <= 10 else -1
        if not 0 <= token_id < num_tokens:
            raise invalid("logit_bias", f"must have token ids in [0, {num_tokens})", key)
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise invalid(f"logit_bias.{token_id}", "must be a number in [-100, 100]", bias)
        biases[token_id] = float(bias)
    return biases


def parse_response_format(value: ResponseFormat | None) -> GrammarSpec | None:
    """The grammar that `response_format` asks for.

    Raises:
        InvalidRequestError: an unknown type, or a schema that is missing, too large or too deep.
    """
    if value is None or value.type == "text":
        return None
    if value.type == "json_object":
        return GrammarSpec("json_object")
    if value.type != "json_schema":
        raise invalid(
            "response_format.type", "must be text, json_object or json_schema", value.type
        )
    param = "response_format.json_schema.schema"
    schema = value.json_schema.schema_ if value.json_schema is not None else None
    if schema is None:
        raise InvalidRequestError(f"{param} is required", param=param)
    source = msgspec.json.encode(schema)
    if len(source) > MAX_SCHEMA_BYTES:
        raise invalid(param, f"must be <= {MAX_SCHEMA_BYTES} bytes", len(source))
    if (depth := _depth(schema)) > MAX_SCHEMA_DEPTH:
        raise invalid(param, f"must nest <= {MAX_SCHEMA_DEPTH} deep", depth)
    return GrammarSpec("json_schema", source.decode())


def _parse_stop_token_ids(request: GenerationFields, model: ServedModel) -> tuple[int, ...]:
    ids = request.stop_token_ids or []
    num_tokens = model.tokenizer.num_real_tokens
    for index, token_id in enumerate(ids):
        if not 0 <= token_id < num_tokens:
            raise InvalidRequestError(
                f"stop_token_ids[{index}] must be in [0, {num_tokens}), got {show(token_id)}",
                param="stop_token_ids",
            )
    return tuple(ids)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _depth(value: Any) -> int:
    """Nesting of a JSON value, whose own depth the body's limit bounds."""
    children = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(_depth, children), default=0)
