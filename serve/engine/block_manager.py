"""Which KV blocks are whose. Not a cache: what is freed is forgotten.

Blocks are numbers; the runner owns the memory. The last freed is the first given out again, so a
small load touches little memory.
"""

from __future__ import annotations

from collections.abc import Iterable


class BlockManager:
    """`num_total_blocks` blocks of `block_size` tokens: free + used == total, always."""

    def __init__(self, num_total_blocks: int, block_size: int) -> None:
        self.num_total_blocks = num_total_blocks
        self.block_size = block_size
        self._free = list(range(num_total_blocks - 1, -1, -1))

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        return self.num_total_blocks - len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` blocks, at most `num_free_blocks`."""
        assert 0 < num_blocks <= len(self._free)
        block_ids = self._free[-num_blocks:]
        del self._free[-num_blocks:]
        return block_ids

    def free(self, block_ids: list[int]) -> None:
        """Give blocks back."""
        self._free.extend(block_ids)

    def check_integrity(self, tables: Iterable[list[int]]) -> None:
        """Assert that free blocks and the given tables together are every block exactly once."""
        seen = [*self._free, *(block_id for table in tables for block_id in table)]
        assert len(seen) == self.num_total_blocks, "a block was lost or given out twice"
        assert set(seen) == set(range(self.num_total_blocks)), "a block is in two places"
