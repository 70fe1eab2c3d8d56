"""A checkpoint's tokenizer: text to ids, and the table from ids to the bytes they stand for.

Not transformers' tokenizer: it reads the same files with `tokenizers` alone, because AutoTokenizer
brings torch into the process. The one decision behind it: the loaded BPE has no added tokens at
all. Control tokens are found by `ControlTokens` first, so a caller decides whether text may hold
them, and text that may not cannot produce one.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer as BpeTokenizer

from serve.checkpoint import read_eos_token_ids
from serve.errors import CheckpointError

from .control_tokens import ControlTokens
from .model_files import MAX_TOKENIZER_BYTES, read_model_file

_MAX_TOKENS = 1 << 21
_SHORT_TEXT_CHARS = 512


class AddedToken(msgspec.Struct, frozen=True):
    """One entry of `added_tokens` in tokenizer.json."""

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class _File(msgspec.Struct):
    """tokenizer.json; what `tokenizers` reads itself stays raw."""

    model: msgspec.Raw
    added_tokens: list[AddedToken] = []
    normalizer: msgspec.Raw = msgspec.Raw(b"null")
    pre_tokenizer: msgspec.Raw = msgspec.Raw(b"null")
    decoder: dict[str, Any] | None = None


class Tokenizer:
    """Byte-level BPE with control tokens kept apart.

    `token_bytes[id]` is what a token adds to the text: b"" for special tokens and for ids without
    a token. `num_real_tokens` is the largest id plus one; a model's padded rows lie above it.

    Raises:
        CheckpointError: an id is too large for a table.
    """

    def __init__(
        self, bpe: BpeTokenizer, added_tokens: list[AddedToken], *, eos_ids: frozenset[int]
    ) -> None:
        self._bpe = bpe
        self._added = {token.id: token for token in added_tokens}
        self.control_tokens = ControlTokens({token.content: token.id for token in added_tokens})
        self.token_bytes = _token_bytes(bpe.get_vocab(with_added_tokens=False), added_tokens)
        self.num_real_tokens = len(self.token_bytes)
        self.eos_ids = eos_ids

    def encode(self, text: str) -> list[int]:
        """Ids of `text` in which nothing is a control token.

        A long text leaves other Python threads running meanwhile: `encode` holds the interpreter's
        lock for as long as it takes (2 s for 500 kB), the batch call does not.
        """
        if len(text) <= _SHORT_TEXT_CHARS:
            ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        else:
            ids = self._bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def encode_markup(self, text: str, *, mark: str = "") -> list[int]:
        """Ids of `text` in which control tokens count, but not those broken by `mark`."""
        ids: list[int] = []
        for piece in self.control_tokens.split(text):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self.encode(piece.replace(mark, "") if mark else piece)
        return ids

    def decode(self, token_ids: list[int]) -> str:
        """Text of whole `token_ids`, special tokens left out; broken UTF-8 becomes U+FFFD."""
        table = self.token_bytes
        return b"".join([table[token_id] for token_id in token_ids]).decode("utf-8", "replace")

    def token_content(self, token_id: int) -> bytes:
        """The bytes that name a token in a list of logprobs, special tokens included."""
        if token_id in self._added:
            return self._added[token_id].content.encode()
        return self.token_bytes[token_id]


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer of a model folder.

    Raises:
        CheckpointError: a file is missing or damaged, or the tokenizer is not byte-level BPE.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text at a time needs no pool
    path = folder / "tokenizer.json"
    content = read_model_file(folder, path.name, max_bytes=MAX_TOKENIZER_BYTES)
    if content is None:
        raise CheckpointError(f"{path} is missing")
    try:
        file = msgspec.json.decode(content, type=_File)
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path}: {exc}"[:300]) from exc
    _check(file, path)
    try:
        bpe = BpeTokenizer.from_buffer(msgspec.json.encode(_without_added_tokens(file)))
    except Exception as exc:  # tokenizers raises bare Exception for a damaged file
        raise CheckpointError(f"{path}: {exc}"[:300]) from exc
    del content
    tokenizer = Tokenizer(bpe, file.added_tokens, eos_ids=frozenset(read_eos_token_ids(folder)))
    del file, bpe
    _return_free_memory()
    return tokenizer


def _check(file: _File, path: Path) -> None:
    if (file.decoder or {}).get("type") != "ByteLevel":
        raise CheckpointError(f"{path}: the tokenizer must be byte-level BPE")
    for token in file.added_tokens:
        if token.lstrip or token.rstrip or token.single_word:
            raise CheckpointError(f"{path}: lstrip, rstrip or single_word of {token.content!r}")
        if len(token.content) < 2:
            raise CheckpointError(f"{path}: added token {token.content!r} is too short")
        if token.id < 0:
            raise CheckpointError(f"{path}: token ids must be >= 0, got {token.id}")


def _without_added_tokens(file: _File) -> dict[str, object]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": file.normalizer,
        "pre_tokenizer": file.pre_tokenizer,
        "post_processor": None,
        "decoder": file.decoder,
        "model": file.model,
    }


def _token_bytes(vocabulary: Mapping[str, int], added: list[AddedToken]) -> list[bytes]:
    size = max([*vocabulary.values(), *(token.id for token in added)], default=-1) + 1
    if size > _MAX_TOKENS:
        raise CheckpointError(f"tokenizer.json: token ids must be < {_MAX_TOKENS}, got {size - 1}")
    table = [b""] * size
    byte_of = _byte_alphabet()
    for token, token_id in vocabulary.items():
        try:
            table[token_id] = bytes(map(byte_of.__getitem__, token))
        except KeyError:
            table[token_id] = token.encode()
    for entry in added:
        table[entry.id] = b"" if entry.special else entry.content.encode()
    return table


def _byte_alphabet() -> dict[str, int]:
    """The 256 characters that byte-level BPE writes bytes with.

    Printable Latin-1 stands for itself; the other 68 bytes are, in order, the characters from
    U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


def _return_free_memory() -> None:
    """Give what reading the vocabulary took back to the system (measured: 101 to 75 MiB)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
