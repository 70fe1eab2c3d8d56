"""Asks a running Shoal over its HTTP API and gives the answer piece by piece as it arrives.

Not a terminal program (`cluster.cli.chat` is). Closing the stream closes the connection, which is
how a client tells the server to stop generating.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from cluster.errors import CommandError, DeniedError

_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


class AnswerStream:
    """A context and an iterator of text; leaving it early stops the answer."""

    def __init__(
        self,
        host: str,
        port: int,
        messages: Sequence[Message],
        *,
        model: str | None = None,
        max_tokens: int | None = None,
        api_key: str | None = None,
    ) -> None:
        body: dict[str, Any] = {
            "messages": [{"role": turn.role, "content": turn.content} for turn in messages],
            "stream": True,
        }
        if model is not None:
            body["model"] = model
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        self._body = json.dumps(body).encode()
        self._headers = {"Content-Type": "application/json", **authorization(api_key)}
        self._connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
        self.finish_reason: str | None = None

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._connection.close()

    def __iter__(self) -> Iterator[str]:
        """Pieces of the answer's text.

        Raises:
            DeniedError: it needs an API key, and got none that it knows.
            CommandError: the server refused, failed in the middle, or is not there.
        """
        try:
            self._connection.request("POST", "/v1/chat/completions", self._body, self._headers)
            response = self._connection.getresponse()
            if response.status == 401:
                raise denied(has_key="Authorization" in self._headers)
            if response.status != 200:
                raise CommandError(_message_of(response.read().decode(errors="replace")))
            yield from self._pieces(response)
        except (OSError, http.client.HTTPException) as exc:
            raise CommandError(f"the server cannot be reached: {exc}") from exc

    def _pieces(self, response: http.client.HTTPResponse) -> Iterator[str]:
        for line in response:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                raise CommandError(_message_of(data.decode()))
            for choice in event.get("choices", []):
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
                text = choice.get("delta", {}).get("content")
                if text:
                    yield text
        raise CommandError("the answer was cut off: the server closed the connection")


def authorization(api_key: str | None) -> dict[str, str]:
    """The header that carries a key; none without one."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def denied(*, has_key: bool) -> DeniedError:
    """What a 401 means, in one line, and what to do about it."""
    return DeniedError(
        "the server does not know this API key, or it has expired"
        if has_key
        else "the server needs an API key",
        hint="Give yours as --key-file FILE or in SHOAL_API_KEY; make one: shoal keys create NAME",
    )


def _message_of(text: str) -> str:
    """The message of an error in OpenAI's shape; `text` itself if it is not one."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text.strip()[:500] or "the server failed without a message"
