"""How many tokens a step may take so that it stays under a length, learnt from the steps so far.

Not a model of the hardware: the time of a step grows at most in proportion to its tokens (there
is a fixed part too), so scaling the last full step down or up by time is safe; growth is at most
twofold a step, because attention makes late chunks of a long prompt dearer than early ones.
"""

from __future__ import annotations

MIN_TOKENS = 16
_MARGIN = 0.9
_SMOOTHING = 0.2


class TokenBudget:
    """Starts at the floor of 16 tokens and finds its size, at most `max_tokens`."""

    def __init__(self, max_tokens: int, max_step_s: float) -> None:
        self._max_tokens = max_tokens
        self._max_step_s = max_step_s
        self.tokens = min(MIN_TOKENS, max_tokens)
        self.tokens_per_s = 0.0

    def prefill_tokens(self, num_decode_tokens: int) -> int:
        """Tokens left for prompts beside `num_decode_tokens`.

        At least 16 where the hard limit has them, so that prompts go on under any decode load.
        """
        wanted = max(self.tokens - num_decode_tokens, MIN_TOKENS)
        return max(min(wanted, self._max_tokens - num_decode_tokens), 0)

    def observe(self, num_tokens: int, *, num_decode_tokens: int, duration_s: float) -> None:
        """Learn from a step of `num_tokens`, of which `num_decode_tokens` could not be left out."""
        if duration_s > 0:
            rate = num_tokens / duration_s
            known = self.tokens_per_s or rate
            self.tokens_per_s = known + _SMOOTHING * (rate - known)
        if num_tokens == num_decode_tokens:
            return
        target = 2 * self.tokens
        if duration_s > 0:
            target = int(_MARGIN * num_tokens * self._max_step_s / duration_s)
        if duration_s > self._max_step_s or num_tokens >= self.tokens:
            bounded = min(target, 2 * self.tokens, self._max_tokens)
            self.tokens = max(bounded, min(MIN_TOKENS, self._max_tokens))
