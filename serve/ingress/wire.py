r"""OpenAI's answers as bytes: chunks of a stream and whole bodies, for both operations.

Not pydantic, not `json.dumps`: everything in a chunk but the text is constant for a choice, so it
is encoded once, when the request arrives. A token then costs the escaping of its text and a join::

    data: {"id":..,"choices":[{"index":0,"delta":{"content":  "Hi"  },"logprobs":null,..}]}\n\n
    `------------------------ head ------------------------'        `-------- tail --------'
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from serve.errors import ShoalError
from serve.messages import FinishReason

from .choice import TokenLogprob
from .logprobs import ChatLogprobs, CompletionLogprobs, TokenContent

DONE = b"data: [DONE]\n\n"

encode_json = msgspec.json.encode


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request, over all its prompts and choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]

    @classmethod
    def of(
        cls, num_prompt_tokens: int, num_completion_tokens: int, *, num_cached_tokens: int
    ) -> Usage:
        """The usage of so many tokens; those cached are some of the prompts'."""
        total = num_prompt_tokens + num_completion_tokens
        details = {"cached_tokens": num_cached_tokens}
        return cls(num_prompt_tokens, num_completion_tokens, total, details)


class Envelope(msgspec.Struct, frozen=True):
    """What every chunk of an answer repeats."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str


class FinishedChoice(msgspec.Struct, frozen=True):
    """All of one choice, for an answer in one piece."""

    index: int
    text: str
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason


class Wire(Protocol):
    """How one operation writes an answer."""

    def first_event(self, index: int) -> bytes:
        """What precedes a choice's text, b"" for nothing."""
        ...

    def text_event(
        self, index: int, text: str, logprobs: list[TokenLogprob] | None, usage: Usage | None
    ) -> bytes:
        """A piece of a choice's text."""
        ...

    def finish_event(self, index: int, reason: FinishReason) -> bytes:
        """The end of a choice."""
        ...

    def usage_event(self, usage: Usage) -> bytes:
        """The chunk without choices."""
        ...

    def body(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        """The answer in one piece."""
        ...


class _Events:
    """The chunks of one answer, around the operation's own middle part.

    `heads` ends where the text's JSON string goes. Every chunk has a usage where the client asked
    for it: null but in the last, or so far with `continuous_usage_stats`.
    """

    def __init__(
        self, envelope: Envelope, *, before: bytes, after: bytes, has_usage: bool, num_choices: int
    ) -> None:
        self._start = b"data: " + encode_json(envelope)[:-1]
        self._before = before
        self._heads = [self.head(index) + before for index in range(num_choices)]
        self._after_logprobs = b',"finish_reason":null}]'
        self._before_logprobs = after + b',"logprobs":'
        self._end = b',"usage":null}\n\n' if has_usage else b"}\n\n"
        self._tail = self._before_logprobs + b"null" + self._after_logprobs + self._end

    def head(self, index: int) -> bytes:
        return self._start + b',"choices":[{"index":%d,' % index

    def text(self, index: int, text: str) -> bytes:
        return self._heads[index] + encode_json(text) + self._tail

    def rich_text(self, index: int, text: str, logprobs: object, usage: Usage | None) -> bytes:
        pieces = [self._heads[index], encode_json(text), self._before_logprobs]
        pieces += [encode_json(logprobs), self._after_logprobs]
        pieces.append(self._end if usage is None else b',"usage":%b}\n\n' % encode_json(usage))
        return b"".join(pieces)

    def choice(self, index: int, rest: bytes) -> bytes:
        return self.head(index) + rest + b"}]" + self._end

    def usage(self, usage: Usage) -> bytes:
        return self._start + b',"choices":[],"usage":' + encode_json(usage) + b"}\n\n"


class ChatWire:
    """`chat.completion` and `chat.completion.chunk`."""

    def __init__(
        self,
        envelope: Envelope,
        *,
        num_choices: int,
        has_usage: bool,
        token_content: TokenContent,
    ) -> None:
        self._envelope = envelope
        self._logprobs = ChatLogprobs(token_content)
        self._events = _Events(
            msgspec.structs.replace(envelope, object="chat.completion.chunk"),
            before=b'"delta":{"content":',
            after=b"}",
            has_usage=has_usage,
            num_choices=num_choices,
        )

    def first_event(self, index: int) -> bytes:
        delta = b'"delta":{"role":"assistant","content":"","refusal":null}'
        return self._events.choice(index, delta + b',"logprobs":null,"finish_reason":null')

    def text_event(
        self, index: int, text: str, logprobs: list[TokenLogprob] | None, usage: Usage | None
    ) -> bytes:
        if logprobs is None and usage is None:
            return self._events.text(index, text)
        shown = None if logprobs is None else self._logprobs.render(logprobs)
        return self._events.rich_text(index, text, shown, usage)

    def finish_event(self, index: int, reason: FinishReason) -> bytes:
        rest = b'"delta":{},"logprobs":null,"finish_reason":"%b"' % reason.encode()
        return self._events.choice(index, rest)

    def usage_event(self, usage: Usage) -> bytes:
        return self._events.usage(usage)

    def body(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        shown = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": None
                if choice.logprobs is None
                else self._logprobs.render(choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return _whole_body(self._envelope, shown, usage)


class CompletionWire:
    """`text_completion`, whole and in chunks; `prefixes` are echoed prompts, one a choice."""

    def __init__(
        self,
        envelope: Envelope,
        *,
        num_choices: int,
        has_usage: bool,
        token_content: TokenContent,
        prefixes: Sequence[str] = (),
    ) -> None:
        self._envelope = envelope
        self._prefixes = prefixes
        self._logprobs = CompletionLogprobs(token_content)
        self._events = _Events(
            envelope,
            before=b'"text":',
            after=b"",
            has_usage=has_usage,
            num_choices=num_choices,
        )

    def first_event(self, index: int) -> bytes:
        return self._events.text(index, self._prefixes[index]) if self._prefixes else b""

    def text_event(
        self, index: int, text: str, logprobs: list[TokenLogprob] | None, usage: Usage | None
    ) -> bytes:
        if logprobs is None and usage is None:
            return self._events.text(index, text)
        return self._events.rich_text(index, text, self._shown(index, logprobs), usage)

    def finish_event(self, index: int, reason: FinishReason) -> bytes:
        rest = b'"text":"","logprobs":null,"finish_reason":"%b"' % reason.encode()
        return self._events.choice(index, rest)

    def usage_event(self, usage: Usage) -> bytes:
        return self._events.usage(usage)

    def body(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        shown = [
            {
                "index": choice.index,
                "text": self._prefix(choice.index) + choice.text,
                "logprobs": self._shown(choice.index, choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return _whole_body(self._envelope, shown, usage)

    def _prefix(self, index: int) -> str:
        return self._prefixes[index] if self._prefixes else ""

    def _shown(self, index: int, logprobs: list[TokenLogprob] | None) -> object:
        if logprobs is None:
            return None
        return self._logprobs.render(logprobs, offset=len(self._prefix(index)))


def error_object(error: ShoalError) -> dict[str, dict[str, str | None]]:
    """An error in OpenAI's shape."""
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def error_event(error: ShoalError) -> bytes:
    """What ends a stream that fails: named, and readable by clients that look at data alone."""
    return b"event: error\ndata: " + encode_json(error_object(error)) + b"\n\n"


def _whole_body(envelope: Envelope, choices: list[dict[str, Any]], usage: Usage) -> bytes:
    return encode_json({**msgspec.structs.asdict(envelope), "choices": choices, "usage": usage})
