"""The floor of the token path: one uvicorn process that holds the step loop and the clients.

No Ray, no proxy, no tokenizer: a step of fixed length, one prepared SSE event per stream and step.
Run as `python -m scripts.bench.bare_server PORT STEP_MS`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

HEAD = (
    b'data: {"id":"cmpl-00000000000000000000000000000000","object":"text_completion",'
    b'"created":1700000000,"model":"demo","system_fingerprint":"fp_0000000000",'
    b'"choices":[{"index":0,"text":'
)
TAIL = b',"logprobs":null,"finish_reason":null}]}\n\n'


class BareServer:
    """An ASGI application: every open stream gets one event a step."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._waiting: set[asyncio.Future[str]] = set()
        self._ticker: asyncio.Task[None] | None = None

    async def __call__(
        self,
        scope: dict[str, Any],
        receive: Callable[[], Awaitable[dict[str, Any]]],
        send: Callable[[dict[str, Any]], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            return
        if self._ticker is None:
            self._ticker = asyncio.create_task(self._tick())
        body = json.loads((await receive())["body"])
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        loop = asyncio.get_running_loop()
        for _ in range(body["max_tokens"]):
            future = loop.create_future()
            self._waiting.add(future)
            event = HEAD + json.dumps(await future).encode() + TAIL
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._step_s)
            waiting, self._waiting = self._waiting, set()
            for future in waiting:
                if not future.done():
                    future.set_result("x")


if __name__ == "__main__":
    uvicorn.run(
        BareServer(float(sys.argv[2]) / 1000),  # type: ignore[arg-type]
        port=int(sys.argv[1]),
        access_log=False,
        log_level="warning",
        lifespan="off",
    )
