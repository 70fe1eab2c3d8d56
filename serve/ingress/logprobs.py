r"""Logprobs in OpenAI's two shapes.

A token is named by its text; one that is no whole UTF-8 text by itself is named "bytes:\xe2\x80",
as OpenAI does, so that no two tokens share a name. Minus infinity is -9999, for JSON has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serve.messages import TopLogprobs

from .choice import TokenLogprob

LEAST_LOGPROB = -9999.0

TokenContent = Callable[[int], bytes]


class ChatLogprobs:
    """`choices[].logprobs` of a chat completion: one entry a token."""

    def __init__(self, token_content: TokenContent) -> None:
        self._token_content = token_content

    def render(self, entries: list[TokenLogprob]) -> dict[str, Any]:
        """The entries, each with its alternatives, best first."""
        return {"content": [self._entry(entry) for entry in entries], "refusal": None}

    def _entry(self, entry: TokenLogprob) -> dict[str, Any]:
        logprobs = entry.logprobs
        return {
            **self._token(entry.token_id, logprobs.logprob),
            "top_logprobs": [
                self._token(token_id, logprob)
                for token_id, logprob in zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
            ],
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        content = self._token_content(token_id)
        return {"token": _name(content), "logprob": _finite(logprob), "bytes": list(content)}


class CompletionLogprobs:
    """`choices[].logprobs` of a completion: one list a field."""

    def __init__(self, token_content: TokenContent) -> None:
        self._token_content = token_content

    def render(self, entries: list[TokenLogprob], *, offset: int) -> dict[str, Any]:
        """The entries; `offset` is where the choice's own text starts in the answer's."""
        return {
            "tokens": [_name(self._token_content(entry.token_id)) for entry in entries],
            "token_logprobs": [_finite(entry.logprobs.logprob) for entry in entries],
            "top_logprobs": [
                self._alternatives(entry.token_id, entry.logprobs) for entry in entries
            ],
            "text_offset": [offset + entry.start for entry in entries],
        }

    def _alternatives(self, token_id: int, logprobs: TopLogprobs) -> dict[str, float]:
        alternatives = {
            _name(self._token_content(other)): _finite(logprob)
            for other, logprob in zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
        }
        alternatives.setdefault(_name(self._token_content(token_id)), _finite(logprobs.logprob))
        return alternatives


def _name(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
