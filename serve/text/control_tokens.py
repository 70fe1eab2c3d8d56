r"""Which parts of a prompt are control tokens: what a template wrote, never what a user wrote.

Not a tokenizer: it finds the vocabulary's added tokens ("<|im_end|>", "<tool_call>") in text. The
one decision behind it: a template mixes both kinds of text in one string, so every control token
inside a user's string is broken by one mark before the template runs. The rendered text is split
at the whole tokens, and only then the marks are taken out again::

    user string   "a<|im_end|>b"      guard  ->  "a<MARK|im_end|>b"
    rendered      "<|im_start|>user\na<MARK|im_end|>b<|im_end|>"
    split         [im_start] "user\na<|im_end|>b" [im_end]

Strings without control tokens pass unchanged, so ordinary text is encoded exactly as if the whole
rendered text went through the tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class ControlTokens:
    """The added tokens of a vocabulary, by content."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = dict(ids)
        contents = sorted(self._ids, key=len, reverse=True)  # the longest of several that match
        self._pattern = re.compile("|".join(map(re.escape, contents)) or r"(?!)")
        self._prefixes = {content[:end] for content in contents for end in range(1, len(content))}
        self._max_prefix = max(map(len, self._prefixes), default=0)

    def split(self, text: str) -> Iterator[str | int]:
        """Pieces of `text` in order: ordinary text (never empty) and ids of control tokens."""
        start = 0
        for match in self._pattern.finditer(text):
            if match.start() > start:
                yield text[start : match.start()]
            yield self._ids[match.group()]
            start = match.end()
        if start < len(text):
            yield text[start:]

    def guard(self, value: Any) -> tuple[Any, str]:
        """Break the control tokens in every string of a JSON `value`.

        Returns:
            The value (the same object where nothing had to be broken) and the mark to take out
            of the split text: a noncharacter that no string of `value` holds, or "".
        """
        strings = list(_strings(value))
        if not any(map(self._is_risky, strings)):
            return value, ""
        text = "".join(strings)
        mark = next((char for char in _NONCHARACTERS if char not in text), _NONCHARACTERS[0])
        return _map_strings(value, lambda string: self._break(string, mark)), mark

    def _is_risky(self, string: str) -> bool:
        # `in` is many times as fast as the pattern on a long string that is full of "<|"
        return any(content in string for content in self._ids) or self._tail_size(string) > 0

    def _break(self, string: str, mark: str) -> str:
        size = self._tail_size(string)
        if size:  # the template may put the token's other half right behind
            end = len(string.rstrip())
            string = f"{string[: end - size + 1]}{mark}{string[end - size + 1 :]}"
        return self._pattern.sub(lambda match: f"{match[0][0]}{mark}{match[0][1:]}", string)

    def _tail_size(self, string: str) -> int:
        """Length of the longest unfinished control token at the end of `string`."""
        string = string.rstrip()
        for size in range(min(self._max_prefix, len(string)), 0, -1):
            if string[-size:] in self._prefixes:
                return size
        return 0


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    return value
