"""Under which keys a sequence's full blocks are shared: namespace and chained hash.

Not a cache: see `block_manager`. A block of 16, 32, ... tokens takes the hash that the ingress
computed for its last 16; other sizes have chains of their own. Tokens that are generated go on
with the chain, so that the next turn of a conversation finds its answer's blocks too.
"""

from __future__ import annotations

from copy import copy

from serve.messages import Prompt
from serve.prefix import HASH_BLOCK_TOKENS, HASH_BYTES, ROOT_HASH, hash_blocks, next_hash


class PrefixKeys:
    """Keys of the first blocks of one sequence, extended as its blocks fill.

    A hash knows tokens alone and the namespace is a part of every key, so two namespaces share
    nothing.
    """

    __slots__ = ("_block_size", "_keys", "_namespace", "_num_unit_tokens")

    def __init__(self, prompt: Prompt, *, namespace: bytes, block_size: int) -> None:
        unit = HASH_BLOCK_TOKENS if block_size % HASH_BLOCK_TOKENS == 0 else block_size
        hashes = prompt.block_hashes
        if unit != HASH_BLOCK_TOKENS or len(hashes) != len(prompt.token_ids) // unit:
            hashes = hash_blocks(prompt.token_ids, num_block_tokens=unit)
        num_units = block_size // unit
        self._namespace = namespace
        self._block_size = block_size
        self._num_unit_tokens = unit
        self._keys = [namespace + one for one in hashes[num_units - 1 :: num_units]]

    def copy(self) -> PrefixKeys:
        """The same keys for another sequence of the same prompt, which goes on by itself."""
        other = copy(self)
        other._keys = list(self._keys)
        return other

    def first(self, num_blocks: int, token_ids: list[int]) -> list[bytes]:
        """Keys of the first `num_blocks` blocks of `token_ids`, all of them full."""
        while len(self._keys) < num_blocks:
            self._keys.append(self._next(token_ids))
        return self._keys[:num_blocks]

    def key(self, position: int, token_ids: list[int]) -> bytes:
        """Key of the full block `position` of `token_ids`."""
        while len(self._keys) <= position:
            self._keys.append(self._next(token_ids))
        return self._keys[position]

    def _next(self, token_ids: list[int]) -> bytes:
        keys, unit = self._keys, self._num_unit_tokens
        parent = keys[-1][-HASH_BYTES:] if keys else ROOT_HASH
        start = len(keys) * self._block_size
        for position in range(start, start + self._block_size, unit):
            parent = next_hash(parent, token_ids[position : position + unit])
        return self._namespace + parent
