"""The whole ASGI application: who may ask, which callable answers, the last resort for errors.

Not where Ray is wired in: `serve.app` passes the models and a dispatcher. The two generating
operations are called directly, everything else goes to FastAPI; errors of both leave in OpenAI's
shape. All of it stands behind the keys, where there are some.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.config import HttpConfig
from serve.errors import (
    ConfigurationError,
    InternalError,
    InvalidRequestError,
    MethodNotAllowedError,
    RouteNotFoundError,
    ShoalError,
)
from serve.keys import KeyRing

from .auth import Authentication
from .endpoint import GenerateEndpoint
from .operations import prepare_chat, prepare_completion
from .responses import error_headers, request_id_of, send_error
from .routes import PAGE_PATHS, build_routes
from .served_model import ServedModel, ServedModels
from .stream import Dispatcher
from .wire import error_object

_ENCODING_THREADS = 2
_ALLOW_POST = "OPTIONS, POST"
_ALLOW_READ = "GET, HEAD, OPTIONS"

_log = logging.getLogger("shoal.ingress")


def build_app(
    *, http: HttpConfig, models: Sequence[ServedModel], dispatcher: Dispatcher
) -> ASGIApp:
    """The whole HTTP API over `dispatcher`.

    Raises:
        ConfigurationError: the keys file cannot be used, or the API would be open to others than
            this machine although nobody said so.
    """
    _check_exposure(http)
    served = ServedModels(models)
    executor = ThreadPoolExecutor(_ENCODING_THREADS, thread_name_prefix="encode")
    endpoints = {
        path: GenerateEndpoint(
            prepare,
            models=served,
            dispatcher=dispatcher,
            executor=executor,
            max_body_bytes=http.max_body_bytes,
        )
        for path, prepare in (
            ("/v1/completions", prepare_completion),
            ("/v1/chat/completions", prepare_chat),
        )
    }
    has_keys = http.keys_file is not None
    routes = build_routes(
        models=served, dispatcher=dispatcher, has_keys=has_keys, has_page=http.page
    )
    _add_error_handlers(routes)
    api = _Api(endpoints, routes)
    if http.keys_file is None:
        return api
    open_paths = PAGE_PATHS if http.page else ()
    return Authentication(api, KeyRing(http.keys_file), open_paths=open_paths)


def _check_exposure(http: HttpConfig) -> None:
    """The last line of defence: whoever starts the server has decided this before."""
    if http.is_loopback or http.keys_file is not None or http.allow_anonymous:
        return
    raise ConfigurationError(
        f"http.host {http.host} can be reached from other machines: give http.keys_file, or"
        " http.allow_anonymous: true to serve anyone"
    )


class _Api:
    """Chooses by path; answers what both sides cannot."""

    def __init__(self, endpoints: dict[str, GenerateEndpoint], routes: FastAPI) -> None:
        self._endpoints = endpoints
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._routes(scope, receive, send)
            return
        endpoint = self._endpoints.get(scope["path"])
        if endpoint is not None and scope["method"] == "POST":
            await endpoint(scope, receive, send)
            return
        guarded = _GuardedSend(send, request_id_of(scope))
        try:
            if scope["method"] == "OPTIONS":
                await _send_options(guarded, endpoint)
            elif endpoint is not None:
                allow = [(b"allow", _ALLOW_POST.encode())]
                await send_error(guarded, _not_allowed(_ALLOW_POST, scope["method"]), allow)
            else:
                await self._routes(scope, receive, guarded)
        except Exception:
            _log.exception("a request failed")
            if not guarded.is_started:
                await send_error(guarded, InternalError("internal error"))


class _GuardedSend:
    """`send` that adds the request's id and remembers whether the response has started."""

    def __init__(self, send: Send, request_id: bytes) -> None:
        self._send = send
        self._request_id = request_id
        self.is_started = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.is_started = True
            headers = [*message.get("headers", ()), (b"x-request-id", self._request_id)]
            message = {**message, "headers": headers}
        await self._send(message)


async def _send_options(send: Send, endpoint: GenerateEndpoint | None) -> None:
    allow = _ALLOW_READ if endpoint is None else _ALLOW_POST
    headers = [(b"allow", allow.encode())]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _not_allowed(allow: str, method: str) -> MethodNotAllowedError:
    return MethodNotAllowedError(f"the method must be one of {allow}, got {method[:20]}")


def _add_error_handlers(app: FastAPI) -> None:
    async def on_shoal_error(_: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, ShoalError)
        headers = {name.decode(): value.decode() for name, value in error_headers(exc)}
        return JSONResponse(error_object(exc), exc.status, headers)

    async def on_http_exception(request: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, HTTPException)
        error = _from_http(request, exc)
        headers = {"allow": _ALLOW_READ} if exc.status_code == 405 else None
        return JSONResponse(error_object(error), exc.status_code, headers)

    async def on_validation_error(request: Request, exc: Exception) -> JSONResponse:
        return await on_shoal_error(request, InvalidRequestError("the request is not valid"))

    app.add_exception_handler(ShoalError, on_shoal_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)


def _from_http(request: Request, exc: HTTPException) -> ShoalError:
    path = request.url.path[:100]
    if exc.status_code == 404:
        return RouteNotFoundError(f"no such path: {path}")
    if exc.status_code == 405:
        return _not_allowed(_ALLOW_READ, request.method)
    return InvalidRequestError(str(exc.detail)[:200])
