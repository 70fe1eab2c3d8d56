"""One choice of an answer: its tokens in, the text that may be shown out.

Not the wire format. Without stop strings and logprobs a token costs one look-up and one UTF-8
step; with either, tokens are taken one by one so that the cut does not depend on how many arrived
together.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve.errors import ReplicaLostError, from_info
from serve.messages import FinishReason, TokenDelta, TopLogprobs
from serve.text.detokenizer import Detokenizer
from serve.text.stop_strings import StopStrings


class TokenLogprob:
    """A shown token: where its text starts and ends in the choice's text, and its logprobs."""

    __slots__ = ("end", "logprobs", "start", "token_id")

    def __init__(self, token_id: int, start: int, end: int, logprobs: TopLogprobs) -> None:
        self.token_id = token_id
        self.start = start
        self.end = end
        self.logprobs = logprobs


class Choice:
    """State of one choice; `finish_reason` is None while it runs.

    `num_tokens` counts completion tokens, the one that ended it included; `num_cached_tokens` are
    those of its prompt that the prefix cache held, told by the first choice of a prompt.
    `new_logprobs` are those of the tokens whose text `take` just returned.
    """

    __slots__ = (
        "_detokenizer",
        "_end_ids",
        "_num_decoded_chars",
        "_num_shown_chars",
        "_pending",
        "_stops",
        "finish_reason",
        "index",
        "is_started",
        "new_logprobs",
        "num_cached_tokens",
        "num_tokens",
    )

    def __init__(
        self,
        index: int,
        *,
        token_bytes: Sequence[bytes],
        stops: Sequence[str],
        end_ids: frozenset[int],
    ) -> None:
        self.index = index
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.is_started = False
        self.new_logprobs: list[TokenLogprob] = []
        self._detokenizer = Detokenizer(token_bytes)
        self._stops = StopStrings(stops) if stops else None
        self._end_ids = end_ids
        self._pending: list[TokenLogprob] = []
        self._num_decoded_chars = 0
        self._num_shown_chars = 0

    def take(self, delta: TokenDelta) -> str:
        """The text that `delta` adds; sets `finish_reason` when it ends the choice.

        Raises:
            ShoalError: the delta says that the choice failed.
        """
        reason = delta.finish_reason
        self.num_cached_tokens += delta.num_cached_tokens
        if reason == "error" or reason == "abort":
            if delta.error is not None:
                raise from_info(delta.error)
            raise ReplicaLostError(f"the request ended early ({reason})")
        if delta.logprobs is not None:
            text = self._take_with_logprobs(delta, delta.logprobs)
        elif self._stops is not None:
            text = self._take_with_stops(self._stops, delta.token_ids, is_last=reason == "stop")
        else:
            text = self._take_all(delta.token_ids, is_last=reason == "stop")
        if reason is not None and self.finish_reason is None:
            text += self._finish(reason)
        return text

    def _take_all(self, token_ids: Sequence[int], *, is_last: bool) -> str:
        self.num_tokens += len(token_ids)
        if is_last and token_ids and token_ids[-1] in self._end_ids:
            token_ids = token_ids[:-1]
        return self._detokenizer.feed(token_ids)

    def _take_with_stops(
        self, stops: StopStrings, token_ids: Sequence[int], *, is_last: bool
    ) -> str:
        """Token by token: those behind the one that completes a stop string never count."""
        text = ""
        last = len(token_ids) - 1
        for position, token_id in enumerate(token_ids):
            decoded = self._take_all((token_id,), is_last=is_last and position == last)
            text += stops.feed(decoded)
            if stops.is_stopped:
                self.finish_reason = "stop"
                break
        return text

    def _take_with_logprobs(self, delta: TokenDelta, logprobs: Sequence[TopLogprobs]) -> str:
        text = ""
        last = len(delta.token_ids) - 1
        for position, token_id in enumerate(delta.token_ids):
            is_last = position == last and delta.finish_reason == "stop"
            decoded = self._take_all((token_id,), is_last=is_last)
            self._note(token_id, len(decoded), logprobs[position])
            text += self._show(decoded)
            if self._stops is not None and self._stops.is_stopped:
                self.finish_reason = "stop"
                break
        self._release_logprobs()
        return text

    def _show(self, decoded: str) -> str:
        shown = decoded if self._stops is None else self._stops.feed(decoded)
        self._num_shown_chars += len(shown)
        return shown

    def _finish(self, reason: FinishReason) -> str:
        self.finish_reason = reason
        rest = self._show(self._detokenizer.flush())
        if self._stops is not None:
            if self._stops.is_stopped:
                self.finish_reason = "stop"
            held = self._stops.flush()
            self._num_shown_chars += len(held)
            rest += held
        if self._pending:
            self.new_logprobs += self._pending
            self._pending = []
        return rest

    def _note(self, token_id: int, num_chars: int, logprobs: TopLogprobs) -> None:
        start = self._num_decoded_chars
        self._num_decoded_chars += num_chars
        self._pending.append(TokenLogprob(token_id, start, self._num_decoded_chars, logprobs))

    def _release_logprobs(self) -> None:
        """Hand out the tokens whose text is shown; those behind a cut never are."""
        shown = self._num_shown_chars
        if self.finish_reason is not None:
            self.new_logprobs = [entry for entry in self._pending if entry.start < shown]
            self._pending = []
            return
        count = sum(entry.end <= shown for entry in self._pending)
        self.new_logprobs, self._pending = self._pending[:count], self._pending[count:]
