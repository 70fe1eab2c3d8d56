"""An engine over a pool of token ids whose next token is a hash of all tokens before it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from serve.engine.engine import Engine
from serve.engine.grammar import GrammarCompiler
from serve.engine.protocol import Runner
from serve.engine.settings import EngineSettings
from serve.messages import NewSequence
from serve.testing.slot_runner import Chosen, SlotRunner, choose_by_hash

DEFAULTS: dict[str, Any] = {
    "max_running_sequences": 16,
    "token_budget": 64,
    "max_step_s": 1.0,
    "max_waiting_requests": 100,
    "max_waiting_tokens": 10_000,
    "block_size": 4,
    "num_total_blocks": 64,
    "max_model_len": 200,
    "eos_token_ids": (1,),
}

MakeEngine = Callable[..., Engine]


def choose(new: NewSequence, token_ids: list[int], mask: np.ndarray | None) -> Chosen:
    """By hash; where the prompt starts with 9, end of sequence as the third token."""
    if token_ids[0] == 9 and len(token_ids) == new.num_prompt_tokens + 2:
        return Chosen(1)
    return choose_by_hash(new, token_ids, mask)


@pytest.fixture
def make_engine() -> MakeEngine:
    """Builds an engine; keywords are fields of `EngineSettings`, or runner, grammars, clock."""

    def make(
        *,
        runner: Runner | None = None,
        grammars: GrammarCompiler | None = None,
        clock: Callable[[], float] = lambda: 0.0,
        **settings: Any,
    ) -> Engine:
        chosen = EngineSettings(**{**DEFAULTS, **settings})
        if runner is None:
            runner = SlotRunner(chosen.num_total_blocks, chosen.block_size, choose)
        return Engine(runner, chosen, grammars=grammars, clock=clock)

    return make
