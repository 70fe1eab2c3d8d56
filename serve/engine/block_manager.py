r"""Which KV blocks are whose, and which prefixes the idle ones still hold.

Blocks are numbers; the runner owns the memory. A block is free, used (sequences refer to it) or
cached (nobody does, but its tokens may be asked for again). The one decision: a table gives its
blocks back last first, so a prefix always became idle after everything that continues it, and
taking the front of one list in order of age evicts least-recently-used leaves::

    system prompt  A  B            idle, oldest first:  D  C  B  A
                     / \           evicted first: D, then C; never B before both
                    C   D
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable


class _Prefix:
    """A full block's tokens and all before them, by key, and the blocks that hold the last ones.

    Several hold the same where sequences computed it beside each other: then all are used.
    """

    __slots__ = ("block_ids", "key", "num_children", "parent")

    def __init__(self, key: bytes, parent: _Prefix | None, block_id: int) -> None:
        self.key = key
        self.parent = parent
        self.block_ids = [block_id]
        self.num_children = 0


class BlockManager:
    """`num_total_blocks` blocks of `block_size` tokens: free + used + cached == total, always.

    Of equal blocks that nobody uses one is kept; where not `has_cache`, none is, and prefixes are
    shared only while they are used. Every operation takes constant time for each block.
    """

    def __init__(self, num_total_blocks: int, block_size: int, *, has_cache: bool = True) -> None:
        self.num_total_blocks = num_total_blocks
        self.block_size = block_size
        self.num_evicted_total = 0
        self._has_cache = has_cache
        self._free = list(range(num_total_blocks - 1, -1, -1))
        self._num_users = [0] * num_total_blocks
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached blocks, oldest first
        self._prefixes: dict[bytes, _Prefix] = {}
        self._prefix_of: list[_Prefix | None] = [None] * num_total_blocks

    @property
    def num_available_blocks(self) -> int:
        """Blocks that `allocate` can give: the free ones, and cached ones that it evicts."""
        return len(self._free) + len(self._idle)

    @property
    def num_cached_blocks(self) -> int:
        return len(self._idle)

    @property
    def num_used_blocks(self) -> int:
        return self.num_total_blocks - len(self._free) - len(self._idle)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def find(self, keys: Iterable[bytes]) -> tuple[list[int], int]:
        """Blocks that hold the longest known prefix of `keys`, and how many of them are cached."""
        block_ids: list[int] = []
        num_cached = 0
        for key in keys:
            prefix = self._prefixes.get(key)
            if prefix is None:
                break
            block_id = prefix.block_ids[0]
            block_ids.append(block_id)
            num_cached += self._num_users[block_id] == 0
        return block_ids, num_cached

    def share(self, block_ids: list[int]) -> None:
        """Use blocks just found."""
        for block_id in block_ids:
            if self._num_users[block_id] == 0:
                del self._idle[block_id]
            self._num_users[block_id] += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` blocks to write to, at most `num_available_blocks`."""
        assert 0 < num_blocks <= self.num_available_blocks
        while len(self._free) < num_blocks:
            self._evict()
        block_ids = self._free[-num_blocks:]
        del self._free[-num_blocks:]
        for block_id in block_ids:
            self._num_users[block_id] = 1
        return block_ids

    def publish(self, block_id: int, key: bytes, *, parent_id: int | None) -> None:
        """Let others find a used block, now that it is full and computed.

        `parent_id` is the published block before it in the same table.
        """
        prefix = self._prefixes.get(key)
        if prefix is None:
            parent = None if parent_id is None else self._prefix_of[parent_id]
            prefix = self._prefixes[key] = _Prefix(key, parent, block_id)
            if parent is not None:
                parent.num_children += 1
        else:
            self._drop_if_idle(prefix)
            prefix.block_ids.append(block_id)
        self._prefix_of[block_id] = prefix

    def free(self, block_ids: list[int], *, is_kept: bool = True) -> None:
        """Give a table back. Where not `is_kept` nothing that it alone used stays cached."""
        for block_id in reversed(block_ids):
            self._num_users[block_id] -= 1
            if self._num_users[block_id] > 0:
                continue
            prefix = self._prefix_of[block_id]
            if prefix is None:
                self._free.append(block_id)
            elif len(prefix.block_ids) > 1:
                self._drop(prefix, block_id)
            elif self._has_cache and (is_kept or prefix.num_children > 0):
                self._idle[block_id] = None
            else:
                self._forget(prefix)

    def check_integrity(self, tables: Iterable[list[int]]) -> None:
        """Assert that every block is in one place, used as often as `tables` say, and found."""
        users = Counter(block_id for table in tables for block_id in table)
        assert [users[i] for i in range(self.num_total_blocks)] == self._num_users
        places = [*self._free, *self._idle, *users]
        assert len(places) == self.num_total_blocks, "a block was lost or given out twice"
        assert set(places) == set(range(self.num_total_blocks)), "a block is in two places"
        assert self._has_cache or not self._idle
        assert all(self._prefix_of[block_id] is None for block_id in self._free)
        self._check_prefixes()

    def _check_prefixes(self) -> None:
        age = {block_id: position for position, block_id in enumerate(self._idle)}
        children: Counter[bytes] = Counter()
        published: list[int] = []
        for key, prefix in self._prefixes.items():
            assert prefix.key == key
            published += prefix.block_ids
            assert all(self._prefix_of[block_id] is prefix for block_id in prefix.block_ids)
            assert prefix.block_ids
            if len(prefix.block_ids) > 1:
                assert not age.keys() & set(prefix.block_ids), "a copy is kept beside a used block"
            parent = prefix.parent
            if parent is not None:
                assert self._prefixes.get(parent.key) is parent, "a prefix is out of reach"
                children[parent.key] += 1
                if parent.block_ids[0] in age:
                    is_older = age.get(prefix.block_ids[0], len(age)) < age[parent.block_ids[0]]
                    assert is_older, "a prefix would be evicted before what continues it"
        assert all(prefix.num_children == children[key] for key, prefix in self._prefixes.items())
        known = [i for i in range(self.num_total_blocks) if self._prefix_of[i] is not None]
        assert sorted(published) == known
        assert set(age) <= set(known)

    def _evict(self) -> None:
        block_id, _ = self._idle.popitem(last=False)
        prefix = self._prefix_of[block_id]
        assert prefix is not None
        self._forget(prefix)
        self.num_evicted_total += 1

    def _forget(self, prefix: _Prefix) -> None:
        assert prefix.num_children == 0
        del self._prefixes[prefix.key]
        if prefix.parent is not None:
            prefix.parent.num_children -= 1
        [block_id] = prefix.block_ids
        self._drop(prefix, block_id)

    def _drop_if_idle(self, prefix: _Prefix) -> None:
        """Give up the cached block of a prefix that another block holds from now on."""
        block_id = prefix.block_ids[0]
        if self._num_users[block_id] == 0:
            del self._idle[block_id]
            self._drop(prefix, block_id)

    def _drop(self, prefix: _Prefix, block_id: int) -> None:
        prefix.block_ids.remove(block_id)
        self._prefix_of[block_id] = None
        self._free.append(block_id)
