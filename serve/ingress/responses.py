"""Responses outside the token path: errors in OpenAI's shape and small JSON, as raw ASGI.

One place decides headers and the shape of errors, for our own ASGI callables and for the routes
that FastAPI serves alike.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Iterable

from starlette.types import Scope, Send

from serve.errors import RequestTimeoutError, ShoalError

from .wire import encode_json, error_object

Header = tuple[bytes, bytes]

_SANE_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")
_DEFAULT_RETRY_AFTER_S = 1.0


def request_id_of(scope: Scope) -> bytes:
    """The caller's `x-request-id` where it is a plain short word, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return bytes(value)
    return secrets.token_hex(16).encode()


def error_headers(error: ShoalError) -> list[Header]:
    """What an error adds to the headers: when to retry, and that a connection is spent."""
    headers: list[Header] = []
    if error.status in (429, 503):
        retry_after_s = error.retry_after_s or _DEFAULT_RETRY_AFTER_S
        headers.append((b"retry-after", b"%d" % math.ceil(retry_after_s)))
    if isinstance(error, RequestTimeoutError):
        headers.append((b"connection", b"close"))
    return headers


async def send_json(send: Send, status: int, body: bytes, headers: Iterable[Header] = ()) -> None:
    """Send a whole JSON body."""
    length = (b"content-length", b"%d" % len(body))
    start = [(b"content-type", b"application/json"), length, *headers]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: ShoalError, headers: Iterable[Header] = ()) -> None:
    """Send `error` in OpenAI's shape."""
    body = encode_json(error_object(error))
    await send_json(send, error.status, body, [*error_headers(error), *headers])
