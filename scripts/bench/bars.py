"""Speeds of several rounds held against limits and peers: medians, ratios, and which bars are met.

Plain arithmetic on what was measured. The one decision: a ratio is taken within each round, between
neighbours in time, and its median counts; a machine that slows down for a while slows both. The
issue's bars for decoding are against the burst, the best pass of a probe just before; the same
share of what the probe sustains beside our own seconds stands next to it, and is no bar.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Bar:
    """A ratio of ours to something, and the least that is asked of it; None: nothing to compare."""

    name: str
    least: float
    reached: float | None
    against: str

    @property
    def verdict(self) -> str:
        """In a word, or two."""
        if self.reached is None:
            return "not run"
        return "met" if self.reached >= self.least else "missed"


@dataclass(slots=True)
class Speeds:
    """Tokens a second of one engine at one workload, by round; a round may be missing."""

    is_ours: bool
    by_round: dict[int, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Of all rounds."""
        return statistics.median(self.by_round.values())


Table = dict[str, Speeds]  # by engine


def best(table: Table, *, is_ours: bool) -> str | None:
    """The engine with the best median on that side; None: none ran."""
    found = [key for key, speeds in table.items() if speeds.is_ours == is_ours and speeds.by_round]
    return max(found, key=lambda key: table[key].median, default=None)


def ratio(ours: dict[int, float], other: dict[int, float]) -> float | None:
    """The median of the ratios of rounds that both have; without such, the medians' ratio."""
    shared = [ours[number] / other[number] for number in ours if number in other]
    if shared:
        return statistics.median(shared)
    if not ours or not other:
        return None
    return statistics.median(ours.values()) / statistics.median(other.values())


def peer_bar(name: str, table: Table, least: float) -> Bar:
    """Our best engine against the best peer that ran."""
    ours, peer = best(table, is_ours=True), best(table, is_ours=False)
    if ours is None or peer is None:
        return Bar(name, least, None, "best peer")
    reached = ratio(table[ours].by_round, table[peer].by_round)
    return Bar(name, least, reached, f"{ours} against {peer}")


def limit_bar(name: str, table: Table, limits: dict[int, float], least: float) -> Bar:
    """Our best engine against the machine's burst in each round."""
    ours = best(table, is_ours=True)
    if ours is None:
        return Bar(name, least, None, "the burst limit")
    reached = ratio(table[ours].by_round, limits)
    return Bar(name, least, reached, f"{ours} against the burst limit")


def pair_bar(name: str, table: Table, first: str, second: str, least: float) -> Bar:
    """One of our engines against another."""
    if first not in table or second not in table:
        return Bar(name, least, None, f"{first} against {second}")
    reached = ratio(table[first].by_round, table[second].by_round)
    return Bar(name, least, reached, f"{first} against {second}")


def percentile(values: list[float], share: float) -> float:
    """The least value that at least `share` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * share) - 1)]
