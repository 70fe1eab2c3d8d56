"""Metrics that are kept in memory: what a test puts in the place of `ray.util.metrics`."""

from __future__ import annotations

from collections import defaultdict

Labels = frozenset[tuple[str, str]]


class Recorded:
    """One metric: the last value, sum or observations by label set; strict like Ray's."""

    def __init__(self, tag_keys: tuple[str, ...]) -> None:
        self.tag_keys = tag_keys
        self.values: dict[Labels, float] = {}
        self.observed: dict[Labels, list[float]] = defaultdict(list)
        self._default_tags: dict[str, str] = {}

    def set_default_tags(self, default_tags: dict[str, str]) -> None:
        """Labels of every value."""
        self._default_tags = default_tags

    def set(self, value: float | None, tags: dict[str, str]) -> None:
        """Replace the value."""
        if value is not None:
            self.values[self._labels(tags)] = value

    def inc(self, value: float, tags: dict[str, str]) -> None:
        """Add to the value.

        Raises:
            ValueError: `value` is not above 0.
        """
        if value <= 0:
            raise ValueError(f"value must be > 0, got {value}")
        labels = self._labels(tags)
        self.values[labels] = self.values.get(labels, 0.0) + value

    def observe(self, value: float, tags: dict[str, str]) -> None:
        """Keep the value."""
        self.observed[self._labels(tags)].append(value)

    def _labels(self, tags: dict[str, str]) -> Labels:
        merged = {**self._default_tags, **tags}
        if set(merged) != set(self.tag_keys):
            raise ValueError(f"labels must be {self.tag_keys}, got {tuple(merged)}")
        return frozenset(merged.items())


class RecordingInstruments:
    """Makes metrics and keeps them by name."""

    def __init__(self) -> None:
        self.made: dict[str, Recorded] = {}

    def Gauge(self, name: str, description: str, tag_keys: tuple[str, ...]) -> Recorded:
        """Make a gauge."""
        return self._make(name, tag_keys)

    def Counter(self, name: str, description: str, tag_keys: tuple[str, ...]) -> Recorded:
        """Make a counter."""
        return self._make(name, tag_keys)

    def Histogram(
        self, name: str, description: str, boundaries: list[float], tag_keys: tuple[str, ...]
    ) -> Recorded:
        """Make a histogram, of which all values are kept."""
        return self._make(name, tag_keys)

    def value(self, name: str, **labels: str) -> float | None:
        """The value of the metric's only label set that has all of `labels`; None: never told."""
        found = [
            value
            for key, value in self.made[name].values.items()
            if frozenset(labels.items()) <= key
        ]
        assert len(found) <= 1, f"{name} has {len(found)} values with {labels}"
        return found[0] if found else None

    def observed(self, name: str) -> list[float]:
        """Every value of a histogram."""
        return [value for values in self.made[name].observed.values() for value in values]

    def _make(self, name: str, tag_keys: tuple[str, ...]) -> Recorded:
        return self.made.setdefault(name, Recorded(tag_keys))
