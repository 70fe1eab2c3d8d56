"""Where an answer ends because it says one of the request's stop strings.

Not a search over the whole answer: only what may still become a stop string is held back, and
nothing behind a cut is ever returned. The occurrence that is complete first wins (of several
complete at the same character, the one that starts first), which does not depend on how the text
was cut into tokens or pieces.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Text of one choice on its way out; `stops` are not empty strings."""

    __slots__ = ("_first_characters", "_held", "_stops", "is_stopped")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._held = ""
        self.is_stopped = False

    def feed(self, text: str) -> str:
        """What is certain to be before any stop string; sets `is_stopped` on a match."""
        if self.is_stopped:
            return ""
        if not self._held and self._first_characters.isdisjoint(text):
            return text
        text = self._held + text
        found = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)[1]]
        cut = min((_partial_start(text, stop) for stop in self._stops), default=len(text))
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The half-matched stop string at the end of the answer."""
        held, self._held = self._held, ""
        return held


def _partial_start(text: str, stop: str) -> int:
    """Where the longest proper prefix of `stop` that ends `text` starts; len(text) if none."""
    start = max(0, len(text) - len(stop) + 1)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return start
        start += 1
    return len(text)
