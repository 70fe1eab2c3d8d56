"""Everything but the token path: models, health, metrics, the page, the OpenAPI document.

FastAPI, because nothing here is hot and it writes `/openapi.json`. The generating operations are
in that document too, from the types that validate them, though other code serves them.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve import __version__
from serve.errors import RouteNotFoundError

from .auth import HEALTH_PATHS
from .exposition import CONTENT_TYPE, render_metrics
from .schema import ChatCompletionRequest, CompletionRequest
from .served_model import ServedModel, ServedModels
from .stream import Dispatcher

PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
        " img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_PAGE_FILES = {
    "index.html": "text/html; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
PAGE_PATHS = ("/", *(f"/static/{name}" for name in _PAGE_FILES))
_ERROR_RESPONSE = {
    "description": "An error in OpenAI's shape",
    "content": {"application/json": {}},
}
Handler = TypeVar("Handler", bound=Callable[..., Any])
_OPERATIONS: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
}


def build_routes(
    *,
    models: ServedModels,
    dispatcher: Dispatcher,
    has_keys: bool = False,
    has_page: bool = True,
) -> FastAPI:
    """The application for every route that is not a generating operation.

    `has_keys` is what the document says; the keys themselves are `auth`'s.
    """
    app = FastAPI(
        title="Shoal",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_models(app, models)
    _add_health(app, models, dispatcher)
    if has_page:
        _add_page(app)
    app.openapi = lambda: _openapi(app, has_keys=has_keys)  # type: ignore[method-assign]
    return app


def _reads(
    app: FastAPI, path: str, *, operation_id: str | None = None
) -> Callable[[Handler], Handler]:
    """Serve GET and HEAD; without an `operation_id` the route is in no document."""

    def add(handler: Handler) -> Handler:
        app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)(handler)
        if operation_id is not None:  # documented only: the route above comes first
            app.get(path, operation_id=operation_id)(handler)
        return handler

    return add


def _add_models(app: FastAPI, models: ServedModels) -> None:
    @_reads(app, "/v1/models", operation_id="list_models")
    async def list_models() -> JSONResponse:
        shown = [_model_object(model) for model in models.all()]
        return JSONResponse({"object": "list", "data": shown})

    @_reads(app, "/v1/models/{name:path}", operation_id="get_model")
    async def get_model(name: str) -> JSONResponse:
        return JSONResponse(_model_object(models.get(name)))


def _add_health(app: FastAPI, models: ServedModels, dispatcher: Dispatcher) -> None:
    def not_ready() -> list[str]:
        names = [model.name for model in models.all()]
        return [name for name in names if not dispatcher.has_ready_replica(name)]

    @_reads(app, "/health/live", operation_id="live")
    async def live() -> JSONResponse:
        return JSONResponse({"status": "live"})

    @_reads(app, "/health", operation_id="health")
    @_reads(app, "/health/ready", operation_id="ready")
    async def ready() -> JSONResponse:
        missing = not_ready()
        if missing:
            return JSONResponse({"status": "not_ready", "models_not_ready": missing}, 503)
        return JSONResponse({"status": "ready", "models_not_ready": []})

    @_reads(app, "/metrics", operation_id="metrics")
    async def metrics() -> Response:
        return Response(render_metrics(await dispatcher.stats()), media_type=CONTENT_TYPE)


def _add_page(app: FastAPI) -> None:
    folder = resources.files("serve.ingress") / "page"
    files = {name: (folder / name).read_bytes() for name in _PAGE_FILES}

    def page_file(name: str) -> Response:
        return Response(files[name], media_type=_PAGE_FILES[name], headers=PAGE_HEADERS)

    @_reads(app, "/")
    async def page() -> Response:
        return page_file("index.html")

    @_reads(app, "/static/{name}")
    async def asset(name: str) -> Response:
        if name not in files:
            raise RouteNotFoundError(f"no such file: {name[:100]}")
        return page_file(name)


def _model_object(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "shoal",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_model_len,
    }


def _openapi(app: FastAPI, *, has_keys: bool) -> dict[str, Any]:
    """FastAPI's document plus the generating operations and, where there are some, the keys."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        template = "#/components/schemas/{model}"
        references, definitions = models_json_schema(
            [(kind, "validation") for kind in _OPERATIONS.values()], ref_template=template
        )
        components = document.setdefault("components", {}).setdefault("schemas", {})
        components.update(definitions.get("$defs", {}))
        for path, kind in _OPERATIONS.items():
            document["paths"][path] = {"post": _operation(references[kind, "validation"])}
        if has_keys:
            _add_security(document)
        app.openapi_schema = document
    return app.openapi_schema


def _add_security(document: dict[str, Any]) -> None:
    scheme = {"type": "http", "scheme": "bearer", "description": "A key of `shoal keys create`."}
    document["components"]["securitySchemes"] = {"apiKey": scheme}
    document["security"] = [{"apiKey": []}]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if path in HEALTH_PATHS:
                operation["security"] = []
            else:
                operation["responses"]["401"] = _ERROR_RESPONSE


def _operation(body: dict[str, Any]) -> dict[str, Any]:
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {
            "200": {
                "description": "The answer, or its events with stream: true",
                "content": {"application/json": {}, "text/event-stream": {}},
            },
            **dict.fromkeys(("400", "404", "408", "413", "429", "500", "503"), _ERROR_RESPONSE),
        },
    }
