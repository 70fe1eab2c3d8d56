"""A Serve application without a model: what the launcher's tests deploy.

Answers `/health/ready`, streams slowly at `/slow?chunks=N`, and fails in its constructor if told.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve as ray_serve


class Toy:
    def __init__(self, *, failure: str = "") -> None:
        if failure:
            raise ValueError(failure)

    async def __serve_build_asgi_app__(self) -> Any:
        return answer


async def answer(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    num_chunks = int(scope["query_string"] or b"0")
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for _ in range(num_chunks):
        await send({"type": "http.response.body", "body": b"chunk\n", "more_body": True})
        await asyncio.sleep(0.1)
    await send({"type": "http.response.body", "body": b"end\n"})


def build(args: dict[str, str]) -> Any:
    """The application that Serve's REST API asks for by import path."""
    deployment = ray_serve.deployment(
        ray_serve.ingress()(Toy),
        name="Toy",
        max_ongoing_requests=100,
        graceful_shutdown_timeout_s=20,
        ray_actor_options={"num_cpus": 0.1},
    )
    return deployment.bind(failure=args.get("failure", ""))
