"""Tokens to text as they come: exact, and a constant amount of work a token.

Not `tokenizer.decode` of a growing list: a token is its bytes, and an incremental UTF-8 decoder
keeps the unfinished character. So the pieces joined are the decoding of all tokens, and no piece
ever ends inside a character.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

_new_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """One choice's text. `token_bytes` is the table of `serve.text.tokenizer.Tokenizer`."""

    __slots__ = ("_decode", "_token_bytes")

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._decode = _new_decoder("replace").decode

    def feed(self, token_ids: Sequence[int]) -> str:
        """The whole characters that `token_ids` complete; "" inside a character."""
        table = self._token_bytes
        if len(token_ids) == 1:
            return self._decode(table[token_ids[0]])
        return self._decode(b"".join([table[token_id] for token_id in token_ids]))

    def flush(self) -> str:
        """U+FFFD where the tokens ended inside a character, else ""."""
        return self._decode(b"", True)
