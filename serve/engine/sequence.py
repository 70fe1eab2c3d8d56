"""One token list being generated, and where it stands.

Not a state machine: the scheduler moves it between states, the engine appends its tokens. Its
largest length is fixed when it is admitted (answer, context and KV pool, whichever is least), so
where it ends never depends on its neighbours.
"""

from __future__ import annotations

from enum import Enum

from serve.messages import FinishReason, SamplingParams

from .grammar import Matcher
from .prefix_keys import PrefixKeys

NO_SLOT = -1


class SequenceState(Enum):
    """`WAITING` was never started, `PREEMPTED` waits again; both are in the waiting queue."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class Sequence:
    """Prompt and output in one list, with the KV blocks that hold its first computed tokens.

    The first `num_computed_tokens` are in the KV cache, or will be once the steps that were started
    are over; the first `num_prefill_tokens` were known when it started, so that those behind them
    are decoded one by one. `index` is the choice index within the request. `keys` name its full
    blocks (None: it shares nothing), of which the first `num_published_blocks` can be found by
    others. `sibling` is the choice of the same prompt before it, until it starts.
    `num_cached_tokens` are those of the prompt that were not computed for this prompt.
    """

    __slots__ = (
        "block_ids",
        "index",
        "keys",
        "matcher",
        "max_len",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prefill_tokens",
        "num_prompt_tokens",
        "num_published_blocks",
        "sampling",
        "seq_id",
        "sibling",
        "slot",
        "state",
        "stop_ids",
        "stream_id",
        "token_ids",
    )

    def __init__(
        self,
        seq_id: int,
        stream_id: int,
        *,
        index: int,
        token_ids: list[int],
        num_prompt_tokens: int,
        sampling: SamplingParams,
        max_len: int,
        stop_ids: frozenset[int],
        matcher: Matcher | None,
        keys: PrefixKeys | None,
    ) -> None:
        self.seq_id = seq_id
        self.stream_id = stream_id
        self.index = index
        self.token_ids = token_ids
        self.num_prompt_tokens = num_prompt_tokens
        self.sampling = sampling
        self.max_len = max_len
        self.stop_ids = stop_ids
        self.matcher = matcher
        self.keys = keys
        self.state = SequenceState.WAITING
        self.slot = NO_SLOT
        self.block_ids: list[int] = []
        self.num_computed_tokens = 0
        self.num_prefill_tokens = 0
        self.num_published_blocks = 0
        self.num_cached_tokens = 0
        self.sibling: Sequence | None = None

    @property
    def is_finished(self) -> bool:
        return self.state is SequenceState.FINISHED

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_left_tokens(self) -> int:
        """Tokens that may still come."""
        return self.max_len - len(self.token_ids)

    def replay(self) -> FinishReason | None:
        """Take the grammar over output that was there at first; the reason if that had ended it.

        Raises:
            GrammarError: the grammar does not allow that output.
        """
        reason: FinishReason | None = "length" if self.num_left_tokens <= 0 else None
        for position in range(self.num_prompt_tokens, len(self.token_ids)):
            if self.matcher is not None:
                self.matcher.watch(self.max_len - position)
            reason = self.finish_reason_after(self.token_ids[position])
        return reason

    def finish_reason_after(self, token_id: int) -> FinishReason | None:
        """The reason if `token_id`, which was just appended, is the last.

        Raises:
            GrammarError: the grammar does not allow `token_id`.
        """
        matcher = self.matcher
        if token_id in self.stop_ids or (matcher is not None and matcher.consume(token_id)):
            return "length" if matcher is not None and matcher.is_closing else "stop"
        return "length" if self.num_left_tokens <= 0 else None
