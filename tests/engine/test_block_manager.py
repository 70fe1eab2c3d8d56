"""The allocator under random use: no block is lost, shared or invented."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from serve.engine.block_manager import BlockManager

NUM_BLOCKS = 12


class BlockMachine(RuleBasedStateMachine):
    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS, 4)
        self.held: list[list[int]] = []

    @rule(target=tables, share=st.floats(0, 1))
    def allocate(self, share: float) -> list[int]:
        num_blocks = round(share * self.blocks.num_free_blocks)
        if num_blocks == 0:
            return []
        table = self.blocks.allocate(num_blocks)
        assert len(table) == num_blocks
        self.held.append(table)
        return table

    @rule(table=consumes(tables))
    def free(self, table: list[int]) -> None:
        if table:
            self.held = [held for held in self.held if held is not table]
            self.blocks.free(table)

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        self.blocks.check_integrity(self.held)
        assert self.blocks.num_used_blocks == sum(map(len, self.held))
        assert self.blocks.num_free_blocks + self.blocks.num_used_blocks == NUM_BLOCKS


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_blocks_for_tokens_round_up() -> None:
    blocks = BlockManager(NUM_BLOCKS, 4)

    assert [blocks.num_blocks_for(n) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]
