"""Who may ask: an ASGI layer around the whole application that lets nothing pass without a key.

Not a dependency of the routes (those run after the body was read, and a route can forget them) and
not quotas. The one decision: default-deny, decided on the very path that the routes match and on
nothing else of the address (no Host, no URL, no query), before a byte of the body is awaited. What
needs no key is a closed list: health, the page's own files, and a browser's preflight.

A key is taken from one place, `Authorization: Bearer KEY`, which every OpenAI client sends: not
from `x-api-key`, a cookie or the query, where it would end up in logs.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.errors import AuthenticationError
from serve.keys import KeyRing

from .responses import Header, request_id_of, send_error
from .wire import encode_json, error_object

HEALTH_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/-/healthz"})
KEY_NAME_STATE = "api_key_name"
MAX_HEADER_BYTES = 512
DRAIN_BYTES = 1024 * 1024
DRAIN_S = 5.0

_BEARER = re.compile(rb"bearer +([A-Za-z0-9._~+/-]+=*) *", re.IGNORECASE)
_CHALLENGE: Header = (b"www-authenticate", b"Bearer")
_NO_STORE: Header = (b"cache-control", b"no-store")
_CLOSE: Header = (b"connection", b"close")
_MISSING = "an API key is needed: send it as the one header `Authorization: Bearer KEY`"
_WRONG = "this API key is not known here, or it has expired"
_POLICY_VIOLATION = 1008


class Authentication:
    """`app` behind the keys of `keys`; GET and HEAD of `open_paths` need none.

    A request with a key carries its name on in `scope["state"][KEY_NAME_STATE]`.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, *, open_paths: Iterable[str]) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = HEALTH_PATHS | frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_open(scope):
            await self._app(scope, receive, send)
            return
        key = _presented(scope)
        name = None if key is None else self._keys.find(key)
        if name is not None:
            scope.setdefault("state", {})[KEY_NAME_STATE] = name
            await self._app(scope, receive, send)
            return
        error = AuthenticationError(_MISSING if key is None else _WRONG)
        if scope["type"] == "websocket":
            await _refuse_websocket(scope, send, error)
        else:
            await _refuse(scope, receive, send, error)

    def _is_open(self, scope: Scope) -> bool:
        if scope["type"] != "http":
            return False
        if scope["method"] == "OPTIONS":
            return _is_preflight(scope)
        return scope["method"] in ("GET", "HEAD") and scope["path"] in self._open_paths


def _is_preflight(scope: Scope) -> bool:
    """Whether a browser asks what it may send: such a request cannot carry a key."""
    names = {name for name, _ in scope["headers"]}
    return {b"origin", b"access-control-request-method"} <= names


def _presented(scope: Scope) -> str | None:
    """The key in the one Authorization header; None where that is not what was sent."""
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1 or len(values[0]) > MAX_HEADER_BYTES:
        return None
    match = _BEARER.fullmatch(values[0])
    return None if match is None else match.group(1).decode("ascii")


async def _refuse(scope: Scope, receive: Receive, send: Send, error: AuthenticationError) -> None:
    """Answer 401 at once, then let a body that is on its way run out, within limits.

    Closing at once would reset the connection while the client still sends, and it might never
    read the answer; reading without a limit would let it hold the connection for ever.
    """
    headers = [_CHALLENGE, _NO_STORE, (b"x-request-id", request_id_of(scope))]
    if not _has_body(scope):
        await send_error(send, error, headers)
        return
    body = encode_json(error_object(error))
    length = (b"content-length", b"%d" % len(body))
    start = [(b"content-type", b"application/json"), length, _CLOSE, *headers]
    await send({"type": "http.response.start", "status": error.status, "headers": start})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    await _drain(receive)
    await send({"type": "http.response.body", "body": b""})


def _has_body(scope: Scope) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0 ") != b"")
        for name, value in scope["headers"]
    )


async def _drain(receive: Receive) -> None:
    num_bytes = 0
    try:
        async with asyncio.timeout(DRAIN_S):
            while num_bytes <= DRAIN_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


async def _refuse_websocket(scope: Scope, send: Send, error: AuthenticationError) -> None:
    """Refuse the handshake: as 401 where the server can say that, else it says 403."""
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
        return
    body = encode_json(error_object(error))
    headers = [(b"content-type", b"application/json"), _CHALLENGE, _NO_STORE]
    start = {"type": "websocket.http.response.start", "status": error.status, "headers": headers}
    await send(start)
    await send({"type": "websocket.http.response.body", "body": body})
