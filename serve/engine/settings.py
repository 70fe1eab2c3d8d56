"""The numbers an engine is built with. Not the user's configuration: "auto" is resolved here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Limits of one engine.

    `max_step_s` is the length of a step, in seconds, that the token budget aims to stay under;
    `max_decode_slowdown` how much longer prompts may make a step of sequences that decode;
    `max_waiting_tokens` counts tokens still to compute of waiting sequences; `max_model_len` is
    prompt plus answer, in tokens; `eos_token_ids` end a sequence unless it ignores them.
    `lookahead` starts each step before the tokens of the one before it are known; `prefix_cache`
    keeps the blocks of finished sequences for others that begin alike.
    """

    max_running_sequences: int
    token_budget: int
    max_step_s: float
    max_waiting_requests: int
    max_waiting_tokens: int
    block_size: int
    num_total_blocks: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    max_decode_slowdown: float = 2.25
    lookahead: bool = False
    prefix_cache: bool = True

    @property
    def num_slots(self) -> int:
        """Tokens that the whole KV pool holds."""
        return self.num_total_blocks * self.block_size
