"""The allocator under random use: no block is lost, invented, or found under another's prefix."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from serve.engine.block_manager import BlockManager

NUM_BLOCKS = 12

paths = st.lists(st.integers(0, 1), min_size=1, max_size=6)


def keys_of(path: list[int]) -> list[bytes]:
    return [bytes(path[: end + 1]) for end in range(len(path))]


class Table:
    """What one sequence holds: blocks for `path`, of which the first are published."""

    def __init__(self, path: list[int], block_ids: list[int], num_published: int) -> None:
        self.path = path
        self.block_ids = block_ids
        self.num_published = num_published


class BlockMachine(RuleBasedStateMachine):
    @initialize(has_cache=st.booleans())
    def begin(self, has_cache: bool) -> None:
        self.has_cache = has_cache
        self.blocks = BlockManager(NUM_BLOCKS, 4, has_cache=has_cache)
        self.tables: list[Table] = []
        self.content: dict[int, bytes] = {}

    @rule(path=paths)
    def take(self, path: list[int]) -> None:
        shared, num_cached = self.blocks.find(keys_of(path)[:-1])
        assert [self.content[block_id] for block_id in shared] == keys_of(path)[: len(shared)]
        num_new = len(path) - len(shared)
        if self.blocks.num_available_blocks - num_cached < num_new:
            return
        self.blocks.share(shared)
        new = self.blocks.allocate(num_new)
        for block_id in new:
            assert all(block_id not in table.block_ids for table in self.tables)
            self.content.pop(block_id, None)
        self.tables.append(Table(path, shared + new, len(shared)))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fill(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        position = table.num_published
        if position < len(table.path):
            block_id, key = table.block_ids[position], keys_of(table.path)[position]
            parent_id = table.block_ids[position - 1] if position else None
            self.blocks.publish(block_id, key, parent_id=parent_id)
            self.content[block_id] = key
            table.num_published += 1

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), is_kept=st.booleans())
    def give_back(self, data: st.DataObject, is_kept: bool) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.tables.remove(table)
        self.blocks.free(table.block_ids, is_kept=is_kept)

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        if hasattr(self, "blocks"):
            self.blocks.check_integrity(table.block_ids for table in self.tables)
            used = {block_id for table in self.tables for block_id in table.block_ids}
            assert self.blocks.num_used_blocks == len(used)
            num_available = self.blocks.num_available_blocks
            assert num_available + len(used) == NUM_BLOCKS
            assert self.has_cache or self.blocks.num_cached_blocks == 0


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def fill_and_free(blocks: BlockManager, path: list[int], *, is_kept: bool = True) -> list[int]:
    shared, _ = blocks.find(keys_of(path))
    blocks.share(shared)
    block_ids = shared + blocks.allocate(len(path) - len(shared))
    for position in range(len(shared), len(path)):
        parent_id = block_ids[position - 1] if position else None
        blocks.publish(block_ids[position], keys_of(path)[position], parent_id=parent_id)
    blocks.free(block_ids, is_kept=is_kept)
    return block_ids


def test_the_least_recently_used_leaf_is_evicted_first() -> None:
    blocks = BlockManager(6, 4)
    fill_and_free(blocks, [1, 2, 3])
    fill_and_free(blocks, [7, 8])
    fill_and_free(blocks, [1, 2, 4])
    found = []
    for _ in range(6):
        blocks.allocate(1)
        found.append([len(blocks.find(keys_of(p))[0]) for p in ([1, 2, 3], [7, 8], [1, 2, 4])])

    assert found == [[2, 2, 3], [2, 1, 3], [2, 0, 3], [2, 0, 2], [1, 0, 1], [0, 0, 0]]
    assert blocks.num_evicted_total == 6


def test_what_a_failed_sequence_computed_alone_is_forgotten() -> None:
    blocks = BlockManager(8, 4)
    fill_and_free(blocks, [1, 2])
    fill_and_free(blocks, [1, 2, 3])
    fill_and_free(blocks, [1, 2, 4, 5], is_kept=False)

    assert len(blocks.find(keys_of([1, 2, 4, 5]))[0]) == 2
    assert len(blocks.find(keys_of([1, 2, 3]))[0]) == 3


def test_equal_blocks_computed_side_by_side_are_kept_once() -> None:
    blocks = BlockManager(8, 4)
    tables = [blocks.allocate(2), blocks.allocate(2)]
    for table in tables:
        blocks.publish(table[0], b"a", parent_id=None)
        blocks.publish(table[1], b"ab", parent_id=table[0])
    for table in tables:
        blocks.free(table)
        blocks.check_integrity(other for other in tables[1:] if table is tables[0])

    assert blocks.num_cached_blocks == 2
    assert blocks.find([b"a", b"ab"]) == (tables[1], 2)


def test_blocks_for_tokens_round_up() -> None:
    blocks = BlockManager(NUM_BLOCKS, 4)

    assert [blocks.num_blocks_for(n) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]
