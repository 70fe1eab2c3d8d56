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
_MAX_END_TOKENS = 512
_END_MARGIN = 16  # tokens by which one token may make the shortest end longer
_LOOK_EVERY = 8  # look again when this fraction of the spare tokens is used


class GrammarError(Exception):
    """The grammar does not allow a token that it is given."""


class Matcher:
    """Where one sequence stands in its grammar, and whether it must come to its end.

    Before each token `watch` compares the tokens left with the shortest end known from here. When
    only a margin is between them, the masks from then on allow that end alone: the text is cut,
    but it parses. Ends are looked for the more often the nearer they are.
    """

    __slots__ = ("_compiler", "_end", "_matcher", "_num_until_look")

    def __init__(self, matcher: LLMatcher, compiler: GrammarCompiler) -> None:
        self._matcher = matcher
        self._compiler = compiler
        self._end: list[int] | None = None  # what is left of it, last token first
        self._num_until_look = 0

    @property
    def is_closing(self) -> bool:
        """Whether the text is being cut to fit."""
        return self._end is not None

    def watch(self, num_left: int) -> None:
        """Decide on the next token's freedom; call once before each, in the order of positions.

        `num_left` tokens may still come, this one included.
        """
        if self._end is not None:
            return
        if self._num_until_look > 0:
            self._num_until_look -= 1
            return
        end = self._compiler.find_end(self._matcher.deep_copy(), num_left)
        num_spare = num_left - len(end) - _END_MARGIN if end else num_left
        if end and num_spare <= 0:
            self._end = end[::-1]
        else:
            self._num_until_look = num_spare // _LOOK_EVERY

    def mask(self) -> np.ndarray:
        """Allowed tokens, bit `i % 32` of word `i // 32` for token i: uint32 [num_words]."""
        if self._end:
            token_id = self._end[-1]
            mask = np.zeros(self._compiler.num_words, dtype=np.uint32)
            mask[token_id // 32] = np.uint32(1 << token_id % 32)
            return mask
        return self._compiler.mask_of(self._matcher)

    def consume(self, token_id: int) -> bool:
        """Advance by a token; whether nothing but the end of sequence can follow.

        Raises:
            GrammarError: `token_id` is not allowed here.
        """
        if not self._matcher.consume_token(token_id):
            raise GrammarError(self._matcher.get_error() or f"token {token_id} is not allowed")
        if self._end:
            self._end.pop()
        return self._matcher.is_stopped()


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
        self.num_words = -(-vocab_size // 32)
        self._eos_token_id = eos_token_ids[0]
        self._byte_ids = self._find_byte_ids()
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
            return Matcher(prototype.deep_copy(), self)

    def mask_of(self, matcher: LLMatcher) -> np.ndarray:
        """The mask of a matcher's state: uint32 [num_words]."""
        mask = np.zeros(self.num_words, dtype=np.uint32)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return mask

    def find_end(self, matcher: LLMatcher, max_tokens: int) -> list[int]:
        """A short way from the state of `matcher` (which moves) to the end of its grammar.

        Byte by byte, closing whatever can be closed. Empty where `max_tokens`, or 512, do not do.
        """
        end: list[int] = []
        while not matcher.is_stopped():
            if len(end) == min(max_tokens, _MAX_END_TOKENS):
                return []
            if matcher.is_accepting():
                return [*end, self._eos_token_id]
            allowed = np.unpackbits(self.mask_of(matcher).view(np.uint8), bitorder="little")
            token_id = self._choose_closing(allowed)
            if not matcher.consume_token(token_id):
                return []
            end.append(token_id)
        return end

    def _choose_closing(self, allowed: np.ndarray) -> int:
        is_allowed = allowed[self._byte_ids]
        if not is_allowed.any():
            return int(allowed.argmax())  # forced text has one spelling in tokens
        # Where both brackets may come they are text, and so is all but the closing quote.
        is_text = is_allowed[0] and is_allowed[1] and is_allowed[2]
        return int(self._byte_ids[2 if is_text else is_allowed.argmax()])

    def _find_byte_ids(self) -> np.ndarray:
        """The token of each single byte, those that close JSON first."""
        first = b'}]":,0'
        rest = bytes(byte for byte in range(256) if byte not in first)
        tokens = [self._tokenizer.tokenize_bytes(bytes([byte])) for byte in first + rest]
        return np.array([ids[0] for ids in tokens], dtype=np.int64)

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
        return LLMatcher.grammar_from_json_schema(
            source,
            overrides={
                "whitespace_flexible": False,
                "key_separator": ": ?",
                "item_separator": ", ?",
            },
        )
    except ValueError as exc:
        raise _invalid(str(exc)) from exc


def _invalid(reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"response_format cannot be compiled: {reason[:_MAX_MESSAGE]}", param="response_format"
    )
