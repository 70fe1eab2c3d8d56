"""Chained hashes of a prompt's blocks: two prompts share a hash exactly where they share a prefix.

Not a cache: the block manager keys its blocks by these, the router its prefix index. The ingress
computes them once a request, so that no other process hashes tokens again.
"""

from __future__ import annotations

import hashlib
from array import array

HASH_BLOCK_TOKENS = 16


def hash_blocks(token_ids: list[int], *, namespace: bytes = b"") -> list[bytes]:
    """Hashes (16 bytes each) of the full blocks of `token_ids`, each chained to the one before.

    `namespace` separates API keys: equal tokens under two namespaces share no hash.
    """
    tokens = array("I", token_ids)
    parent = hashlib.blake2b(namespace, digest_size=16, person=b"shoal-prefix").digest()
    hashes = []
    for end in range(HASH_BLOCK_TOKENS, len(tokens) + 1, HASH_BLOCK_TOKENS):
        block = tokens[end - HASH_BLOCK_TOKENS : end].tobytes()
        parent = hashlib.blake2b(parent + block, digest_size=16).digest()
        hashes.append(parent)
    return hashes
