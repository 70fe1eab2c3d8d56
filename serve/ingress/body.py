"""A request's body: bytes within limits, and the JSON object in them.

Not validation of fields: that is `schema`. Every limit is checked before the work that it bounds,
and every way in which bytes can fail to be a JSON object is a 4xx that says which.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import msgspec
from starlette.types import Receive, Scope

from serve.errors import InvalidRequestError, PayloadTooLargeError, RequestTimeoutError

MAX_JSON_DEPTH = 64
MAX_JSON_CONTAINERS = 65_536
BODY_TIMEOUT_S = 30.0

_STRING = re.compile(rb'"(?:[^"\\]++|\\.?)*+(?:"|\Z)', re.DOTALL)  # linear in every body


class ClientGoneError(Exception):
    """The client closed its connection; nobody is left to answer."""


async def read_body(scope: Scope, receive: Receive, *, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body, sent at once or in chunks.

    Raises:
        PayloadTooLargeError: it is longer than `max_bytes`, by its header or by what came.
        RequestTimeoutError: it did not arrive in `timeout_s`.
        ClientGoneError: the client went away before its end.
    """
    announced = _content_length(scope)
    if announced > max_bytes:
        raise _too_large(max_bytes, str(announced))
    try:
        async with asyncio.timeout(timeout_s):
            return await _receive_all(receive, max_bytes=max_bytes)
    except TimeoutError as exc:
        message = f"the body must arrive in <= {timeout_s:g} s"
        raise RequestTimeoutError(message) from exc


async def _receive_all(receive: Receive, *, max_bytes: int) -> bytes:
    pieces: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        piece = message.get("body", b"")
        num_bytes += len(piece)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes, f"more than {num_bytes - 1}")
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that `body` is.

    Raises:
        InvalidRequestError: it is not JSON (NaN, broken UTF-8 and unpaired surrogates included),
            not an object, holds a number out of range, nests deeper than `MAX_JSON_DEPTH` or
            holds more lists and objects than `MAX_JSON_CONTAINERS`.
    """
    num_opened = body.count(b"[") + body.count(b"{")
    if num_opened > MAX_JSON_CONTAINERS:
        _check_num_containers(body)
    try:
        value = msgspec.json.decode(body)
    except RecursionError as exc:
        raise _too_deep() from exc
    except UnicodeDecodeError as exc:
        raise InvalidRequestError(f"the body is not UTF-8{_first_wrong_byte(body)}") from exc
    except msgspec.MsgspecError as exc:
        if b"\\u" in body and "truncated" in str(exc):
            exc = msgspec.DecodeError("an unpaired surrogate, or it ends too early")
        raise InvalidRequestError(f"the body is not valid JSON: {str(exc)[:150]}") from exc
    if num_opened > MAX_JSON_DEPTH:
        check_depth(value)
    if not isinstance(value, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return value


def _check_num_containers(body: bytes) -> None:
    """Refuse a body of a million empty lists: making and freeing them stalls the whole process."""
    outside_strings = _STRING.sub(b"", body)
    found = outside_strings.count(b"[") + outside_strings.count(b"{")
    if found > MAX_JSON_CONTAINERS:
        raise InvalidRequestError(
            f"the body must hold <= {MAX_JSON_CONTAINERS} lists and objects, got {found}"
        )


def check_depth(value: Any) -> None:
    """Refuse JSON that nests deeper than `MAX_JSON_DEPTH`, without recursion.

    Raises:
        InvalidRequestError: it does.
    """
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_JSON_DEPTH):
        level = [
            child
            for item in level
            for child in (item.values() if type(item) is dict else item)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return
    raise _too_deep()


def _first_wrong_byte(body: bytes) -> str:
    try:
        body.decode()
    except UnicodeDecodeError as exc:
        return f" at byte {exc.start}"
    return ""


def _content_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])
    return 0


def _too_large(max_bytes: int, got: str) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"the body must be <= {max_bytes} bytes, got {got}")


def _too_deep() -> InvalidRequestError:
    return InvalidRequestError(f"the body's JSON must nest <= {MAX_JSON_DEPTH} deep, got more")
