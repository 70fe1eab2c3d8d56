"""What a sequence's text may be, as one bit per token: JSON by llguidance.

Not the sampler: it applies the bits. The one decision: white space, depth and numbers are bounded,
so that a model cannot loop inside the grammar and what it completes parses everywhere (no integer
too long for Python, no exponent beyond a double, no lone surrogate, no 1,000 nested lists).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from serve.errors import InvalidRequestError
from serve.messages import GrammarSpec

MAX_JSON_DEPTH = 32
_MAX_CACHED = 64
_MAX_MESSAGE = 200


class GrammarError(Exception):
    """The grammar does not allow a token that it is given."""


class Matcher:
    """Where one sequence stands in its grammar."""

    __slots__ = ("_matcher", "_num_words")

    def __init__(self, matcher: LLMatcher, num_words: int) -> None:
        self._matcher = matcher
        self._num_words = num_words

    def consume(self, token_id: int) -> bool:
        """Advance by a token; whether nothing but the end can follow.

        Raises:
            GrammarError: `token_id` is not allowed here.
        """
        if not self._matcher.consume_token(token_id):
            raise GrammarError(self._matcher.get_error() or f"token {token_id} is not allowed")
        return self._matcher.is_stopped()

    def mask(self) -> np.ndarray:
        """Allowed tokens, bit `i % 32` of word `i // 32` for token i: uint32 [num_words]."""
        mask = np.zeros(self._num_words, dtype=np.uint32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return mask


class GrammarCompiler:
    """Compiles each grammar once and hands out a fresh matcher for every sequence.

    `tokenizer_json` is the path of tokenizer.json or its text. Masks cover `vocab_size` ids (the
    padded vocabulary); ids from `num_real_tokens` on are never allowed.
    """

    def __init__(
        self,
        tokenizer_json: str | Path,
        *,
        eos_token_ids: tuple[int, ...],
        num_real_tokens: int,
        vocab_size: int,
    ) -> None:
        assert num_real_tokens <= vocab_size
        self._tokenizer = LLTokenizer(
            str(tokenizer_json), n_vocab=vocab_size, eos_token=list(eos_token_ids)
        )
        self._num_words = -(-vocab_size // 32)
        self._compiled: OrderedDict[GrammarSpec, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, spec: GrammarSpec) -> Matcher:
        """A matcher at the start of the grammar.

        Raises:
            InvalidRequestError: the schema cannot be compiled.
        """
        with self._lock:
            prototype = self._compiled.get(spec)
            if prototype is None:
                prototype = self._compile(spec)
                self._compiled[spec] = prototype
            self._compiled.move_to_end(spec)
            if len(self._compiled) > _MAX_CACHED:
                self._compiled.popitem(last=False)
            return Matcher(prototype.deep_copy(), self._num_words)

    def _compile(self, spec: GrammarSpec) -> LLMatcher:
        if spec.kind == "json_object":
            grammar = LLMatcher.grammar_from_lark(json_object_grammar())
        else:
            grammar = _schema_grammar(spec.source)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise _invalid(matcher.get_error())
        return matcher


def json_object_grammar() -> str:
    """Any JSON object of at most `MAX_JSON_DEPTH` levels, in llguidance's Lark dialect."""
    lines = [
        "start: object_1",
        r'ESCAPE: /\\(["\\\/bfnrt]|u([0-9A-CEFa-cef][0-9A-Fa-f]{3}|[Dd][0-7][0-9A-Fa-f]{2}))/',
        r'STRING: "\"" (/[^"\\\x00-\x1F\x7F]/ | ESCAPE)* "\""',
        r"NUMBER: /-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?([eE][+-]?[0-9]{1,2})?/",
        "COMMA: /, ?/",
        "COLON: /: ?/",
        'scalar: STRING | NUMBER | "true" | "false" | "null"',
    ]
    for depth in range(1, MAX_JSON_DEPTH + 1):
        below = depth + 1
        nested = f" | object_{below} | array_{below}" if depth < MAX_JSON_DEPTH else ""
        lines += [
            f"value_{depth}: scalar{nested}",
            f"pair_{depth}: STRING COLON value_{depth}",
            f'object_{depth}: "{{" (pair_{depth} (COMMA pair_{depth})*)? "}}"',
            f'array_{depth}: "[" (value_{depth} (COMMA value_{depth})*)? "]"',
        ]
    return "\n".join(lines)


def _schema_grammar(source: str) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(source, overrides={"whitespace_flexible": False})
    except ValueError as exc:
        raise _invalid(str(exc)) from exc


def _invalid(reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"response_format cannot be compiled: {reason[:_MAX_MESSAGE]}", param="response_format"
    )
