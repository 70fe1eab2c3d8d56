"""A checkpoint's own chat template: messages and tools to the text of a prompt.

Not trusted: the template is code from a model folder and its input is from the network. It runs in
jinja2's immutable sandbox, and one budget bounds its output and its time: every piece of output,
attribute, item, call and loop over our lists looks at the clock. Text with control tokens in it
was broken before (`ControlTokens.guard`), so this file need not know whose text is whose.
"""

from __future__ import annotations

import datetime as dt
import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox

from serve.checkpoint.chat_template import SYNTAX, find_chat_template, not_compiling
from serve.errors import InvalidRequestError

from .model_files import read_json
from .tokenizer import Tokenizer

MAX_OUTPUT_CHARS = 16 * 1024 * 1024
MAX_RENDER_S = 2.0
_MAX_REPEATED_SIZE = 100_000
_MAX_POWER_OPERAND = 1_000
_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """A compiled template; `special_tokens` are the names it may use ("eos_token").

    Raises:
        CheckpointError: it does not compile; names `file`, if that is given.
    """

    def __init__(
        self,
        source: str,
        *,
        file: Path | None = None,
        special_tokens: Mapping[str, str] | None = None,
        max_output_chars: int = MAX_OUTPUT_CHARS,
        max_render_s: float = MAX_RENDER_S,
    ) -> None:
        self._environment = _Sandbox()
        self._special_tokens = dict(special_tokens or {})
        self._max_output_chars = max_output_chars
        self._max_render_s = max_render_s
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as exc:
            raise not_compiling(exc, file) from exc

    def render(
        self, messages: list[dict[str, Any]], *, tools: list[dict[str, Any]] | None = None
    ) -> str:
        """The prompt's text, open for the assistant's answer.

        Raises:
            InvalidRequestError: the template refuses the messages, or takes too much of
                time or text for them.
        """
        pieces: list[str] = []
        num_chars = 0
        self._environment.start_clock(self._max_render_s)
        try:
            for piece in self._template.generate(
                messages=_timed(messages, self._environment),
                tools=_timed(tools, self._environment),
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            ):
                self._environment.check_clock()
                num_chars += len(piece)
                if num_chars > self._max_output_chars:
                    raise jinja2.TemplateRuntimeError(
                        f"its text must be <= {self._max_output_chars} characters"
                    )
                pieces.append(piece)
        except Exception as exc:  # a template can raise whatever Python raises
            reason = str(exc)[:200] or type(exc).__name__
            message = f"the model's chat template refuses these messages: {reason}"
            raise InvalidRequestError(message, param="messages") from exc
        return "".join(pieces)


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of a model folder, None where it has none (base models).

    Raises:
        CheckpointError: it is there and cannot be used.
    """
    source = find_chat_template(folder)
    if source is None:
        return None
    config = read_json(folder, "tokenizer_config.json")
    texts = {name: _special_token(config.get(name)) for name in _SPECIAL_TOKEN_NAMES}
    return ChatTemplate(
        source.text,
        file=source.file,
        special_tokens={name: text for name, text in texts.items() if text is not None},
    )


def _special_token(value: object) -> str | None:
    """A special token of tokenizer_config.json, which may be a string or an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def render_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
) -> tuple[str, str]:
    """A prompt's text and the mark in it, both for `Tokenizer.encode_markup`."""
    (messages, tools), mark = tokenizer.control_tokens.guard([messages, tools])
    return template.render(messages, tools=tools), mark


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The immutable sandbox with a clock that its operations look at (one a thread)."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(**SYNTAX)
        self._clock = threading.local()
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["range"] = lambda *bounds: _TimedList(_bounded_range(*bounds), self)

    def start_clock(self, limit_s: float) -> None:
        self._clock.limit_s = limit_s
        self._clock.deadline_s = time.monotonic() + limit_s

    def check_clock(self) -> None:
        if time.monotonic() > getattr(self._clock, "deadline_s", float("inf")):
            raise jinja2.TemplateRuntimeError(f"it took longer than {self._clock.limit_s} s")

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.check_clock()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.check_clock()
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.check_clock()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.check_clock()
        if operator == "%" and not isinstance(left, int | float):
            raise jinja2.TemplateRuntimeError("it formats by %")
        if operator == "*" and _repeated_size(left, right) > _MAX_REPEATED_SIZE:
            raise jinja2.TemplateRuntimeError("a product is too large")
        if operator == "**" and max(abs(left), abs(right)) > _MAX_POWER_OPERAND:
            raise jinja2.TemplateRuntimeError("a power is too large")
        return super().call_binop(context, operator, left, right)


class _TimedList(list[Any]):
    """A list whose every loop looks at the clock, so that nested empty loops end too."""

    def __init__(self, items: Any, sandbox: _Sandbox) -> None:
        super().__init__(items)
        self._sandbox = sandbox

    def __iter__(self) -> Iterator[Any]:
        self._sandbox.check_clock()
        return super().__iter__()


def _timed(value: Any, sandbox: _Sandbox) -> Any:
    return _TimedList(value, sandbox) if isinstance(value, list) else value


def _repeated_size(left: Any, right: Any) -> int:
    """Length of `left * right` where one of them is a sequence, else 0."""
    for sequence, times in ((left, right), (right, left)):
        if hasattr(sequence, "__len__") and isinstance(times, int):
            return len(sequence) * max(times, 0)
    return 0


def _bounded_range(*bounds: int) -> range:
    items = range(*bounds)
    if len(items) > _MAX_REPEATED_SIZE:
        raise jinja2.TemplateRuntimeError(f"range() must be <= {_MAX_REPEATED_SIZE} long")
    return items


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return dt.datetime.now().strftime(pattern)
