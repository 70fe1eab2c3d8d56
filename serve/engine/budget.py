"""How many tokens a step may take so that it stays under a length, learnt from the steps so far.

Not a model of the hardware: the time of a step grows at most in proportion to its tokens (there
is a fixed part too), so scaling the last full step down or up by time is safe; growth is at most
twofold a step, because attention makes late chunks of a long prompt dearer than early ones.

Beside sequences that decode a second bound holds: what a prompt adds to a step is measured against
a step without one, so that a long prompt slows the others down by a known factor and no more. Where
prompts never pause, one step in 32 goes without them, to know what such a step takes by now.
"""

from __future__ import annotations

MIN_TOKENS = 16
MIN_TOKENS_BESIDE_DECODES = 4
_MARGIN = 0.9
_SMOOTHING = 0.2
_DECODE_SMOOTHING = 0.2
# What a prompt's token adds is believed sooner when it is more than known than when it is less.
_RISING_SMOOTHING = 0.4
_FALLING_SMOOTHING = 0.1
_MAX_STEPS_WITH_PROMPTS = 32


class TokenBudget:
    """Starts at the floor of 16 tokens and finds its size, at most `max_tokens`.

    Args:
        max_tokens: of a step.
        max_step_s: length that steps stay under.
        max_slowdown: length that a step may have, with parts of prompts beside sequences that
            decode, in lengths of a step without.
    """

    def __init__(self, max_tokens: int, max_step_s: float, *, max_slowdown: float) -> None:
        self._max_tokens = max_tokens
        self._max_step_s = max_step_s
        self._max_slowdown = max_slowdown
        self._floor = min(MIN_TOKENS, max_tokens)
        self._decode_step_s = 0.0
        self._shortest_step_s = 0.0
        self._prefill_token_s = 0.0
        self._num_steps_with_prompts = 0
        self.tokens = self._floor
        self.tokens_beside_decodes = self._floor
        self.tokens_per_s = 0.0

    def prefill_tokens(self, num_decode_tokens: int) -> int:
        """Tokens left for prompts beside `num_decode_tokens`.

        At least 4 where the hard limit has them, so that prompts go on under any decode load; none
        in the one step of 32 that is measured without.
        """
        if num_decode_tokens > 0 and self._num_steps_with_prompts >= _MAX_STEPS_WITH_PROMPTS:
            return 0
        wanted = max(self.tokens - num_decode_tokens, MIN_TOKENS)
        if num_decode_tokens > 0:
            wanted = min(wanted, self.tokens_beside_decodes)
        return max(min(wanted, self._max_tokens - num_decode_tokens), 0)

    def observe(self, num_tokens: int, *, num_decode_tokens: int, duration_s: float) -> None:
        """Learn from a step of `num_tokens`, of which `num_decode_tokens` could not be left out."""
        if duration_s > 0:
            self.tokens_per_s = _smooth(self.tokens_per_s, num_tokens / duration_s, _SMOOTHING)
            shortest_s = self._shortest_step_s or duration_s
            self._shortest_step_s = min(shortest_s, duration_s)
        num_prefill_tokens = num_tokens - num_decode_tokens
        if num_prefill_tokens == 0:
            self._decode_step_s = _smooth(self._decode_step_s, duration_s, _DECODE_SMOOTHING)
            self._num_steps_with_prompts = 0
            return
        self._learn_length(num_tokens, duration_s)
        if num_decode_tokens > 0:
            self._num_steps_with_prompts += 1
            self._learn_slowdown(num_prefill_tokens, duration_s)

    def _learn_length(self, num_tokens: int, duration_s: float) -> None:
        target = 2 * self.tokens
        if duration_s > 0:
            target = int(_MARGIN * num_tokens * self._max_step_s / duration_s)
        if duration_s > self._max_step_s or num_tokens >= self.tokens:
            self.tokens = max(min(target, 2 * self.tokens, self._max_tokens), self._floor)

    def _learn_slowdown(self, num_prefill_tokens: int, duration_s: float) -> None:
        """By what a prompt's token adds; before any step without one, the shortest stands in."""
        known = self.tokens_beside_decodes
        decode_step_s = self._decode_step_s or self._shortest_step_s
        allowed_s = (self._max_slowdown - 1.0) * decode_step_s
        added_s = max(duration_s - decode_step_s, 0.0)
        token_s = added_s / num_prefill_tokens
        share = _RISING_SMOOTHING if token_s > self._prefill_token_s else _FALLING_SMOOTHING
        self._prefill_token_s = _smooth(self._prefill_token_s, token_s, share)
        most = known if added_s > allowed_s else 2 * known
        target = most
        if self._prefill_token_s > 0:
            target = int(_MARGIN * allowed_s / self._prefill_token_s)
        if added_s > allowed_s or num_prefill_tokens >= known:
            bounded = min(target, most, self._max_tokens)
            self.tokens_beside_decodes = max(bounded, MIN_TOKENS_BESIDE_DECODES)


def _smooth(known: float, new: float, share: float) -> float:
    return known + share * (new - known) if known else new
