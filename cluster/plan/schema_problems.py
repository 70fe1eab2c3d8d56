"""Pydantic's errors as problems with places: one line for each wrong value.

Not a schema (`serve.config` is). Pydantic reports a union once for each member and an unknown key
without a guess; here the first are joined and the second gets the closest known key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from serve.config import ShoalConfig

from .document import Document, KeyPath, Problem, render_path


def schema_problems(document: Document) -> list[Problem]:
    """Everything that the schema says against the document's values."""
    try:
        ShoalConfig.model_validate(document.values)
    except ValidationError as exc:
        return list(_problems_of(exc, document))
    return []


def _problems_of(exc: ValidationError, document: Document) -> Iterator[Problem]:
    grouped: dict[tuple[KeyPath, str], list[str]] = {}
    for error in exc.errors(include_url=False):
        if error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]:
            continue  # long enough as written: its wrong items are told one by one
        path, message, got = _describe(error, document)
        messages = grouped.setdefault((path, got), [])
        if message not in messages:
            messages.append(message)
    for (path, got), messages in grouped.items():
        message = " or ".join(messages) + got
        yield Problem(document.place_of(path), render_path(path), message)


def _describe(error: ErrorDetails, document: Document) -> tuple[KeyPath, str, str]:
    """Where, what is wrong, and ", got VALUE" (empty where the message has it)."""
    location: KeyPath = error["loc"]
    if error["type"] == "missing":
        return location, "is missing", ""
    path = document.known_part(location)
    if error["type"] == "extra_forbidden":
        return path, _unknown_key(path), ""
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if error["type"] == "value_error":
        return path, message, ""
    return path, message.partition(", unable to")[0], f", got {_shown(error['input'])}"


def _unknown_key(path: KeyPath) -> str:
    known = _known_keys(path[:-1])
    close = difflib.get_close_matches(str(path[-1]), known, n=1)
    guess = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
    return f"unknown key, {guess}"


def _known_keys(path: KeyPath) -> list[str]:
    section: type[BaseModel] = ShoalConfig
    for key in path:
        if isinstance(key, int):
            continue
        section = next(_sections(section.model_fields[key].annotation), section)
    return sorted(section.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
