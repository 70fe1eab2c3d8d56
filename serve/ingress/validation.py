"""From a JSON object to one of the types of `schema`, with errors that a person can act on.

Only the first thing wrong is reported, as OpenAI does: the field's path, the limit and the value,
with at most `MAX_SHOWN_CHARS` of what was sent.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from serve.errors import InvalidRequestError

from .schema import WireModel

MAX_SHOWN_CHARS = 100

_TYPES = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than_equal": (">=", "ge"),
    "greater_than": (">", "gt"),
    "less_than_equal": ("<=", "le"),
    "less_than": ("<", "lt"),
}

WireT = TypeVar("WireT", bound=WireModel)


def validate(kind: type[WireT], value: dict[str, Any]) -> WireT:
    """`value` as a `kind`.

    Raises:
        InvalidRequestError: a field is missing, of the wrong type or out of its range.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as exc:
        error = exc.errors(include_url=False)[0]
        param = _path(error["loc"])
        raise InvalidRequestError(f"{param} {_reason(error)}", param=param) from None


def invalid(param: str, rule: str, value: Any) -> InvalidRequestError:
    """The error that says "`param` `rule`, got `value`"."""
    return InvalidRequestError(f"{param} {rule}, got {show(value)}", param=param)


def show(value: Any) -> str:
    """What was sent, in JSON's words and shortened."""
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        value = value[: MAX_SHOWN_CHARS + 1]
    shown = msgspec.json.encode(value).decode()
    return shown if len(shown) <= MAX_SHOWN_CHARS else shown[:MAX_SHOWN_CHARS] + "..."


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path[:MAX_SHOWN_CHARS]


def _reason(error: ErrorDetails) -> str:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "missing":
        return "is required"
    if kind in _TYPES:
        return f"must be {_TYPES[kind]}, got {show(value)}"
    if kind in _BOUNDS:
        symbol, key = _BOUNDS[kind]
        return f"must be {symbol} {context[key]}, got {show(value)}"
    if kind == "too_long":
        return f"must have <= {context['max_length']} entries, got {context['actual_length']}"
    if kind == "too_short":
        return f"must have >= {context['min_length']} entries, got {context['actual_length']}"
    if kind == "string_too_long":
        return f"must have <= {context['max_length']} characters, got {len(value)}"
    if kind == "literal_error":
        return f"must be one of {context['expected']}, got {show(value)}"
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']}, got {show(value)}"
    return f"is not valid ({error['msg'][:MAX_SHOWN_CHARS]}), got {show(value)}"
