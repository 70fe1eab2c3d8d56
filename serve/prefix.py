"""Chained hashes of a prompt's blocks: two prompts share a hash exactly where they share a prefix.

Not a cache: the block manager keys its blocks by these, the router its prefix index. The ingress
computes them once a request, so that no other process hashes a prompt again.
"""

from __future__ import annotations

import hashlib
from array import array

HASH_BLOCK_TOKENS = 16
HASH_BYTES = 16

ROOT_HASH = hashlib.blake2b(digest_size=HASH_BYTES, person=b"shoal-prefix").digest()
"""What a first block is chained to."""


def hash_blocks(token_ids: list[int], *, num_block_tokens: int = HASH_BLOCK_TOKENS) -> list[bytes]:
    """Hashes (16 bytes each) of the full blocks of `token_ids`, each chained to the one before.

    Of tokens alone: whoever shares something under a hash keeps API keys apart itself.
    """
    tokens = array("I", token_ids)
    parent = ROOT_HASH
    hashes = []
    for end in range(num_block_tokens, len(tokens) + 1, num_block_tokens):
        parent = _chain(parent, tokens[end - num_block_tokens : end])
        hashes.append(parent)
    return hashes


def next_hash(parent: bytes, token_ids: list[int]) -> bytes:
    """The hash of one more block, `token_ids`, behind the block whose hash is `parent`."""
    return _chain(parent, array("I", token_ids))


def _chain(parent: bytes, tokens: array[int]) -> bytes:
    return hashlib.blake2b(parent + tokens.tobytes(), digest_size=HASH_BYTES).digest()
