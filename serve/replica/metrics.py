"""What a replica tells Ray's metrics, so that Ray's own Serve LLM dashboard draws it.

Not the ingress' `/metrics`, which asks replicas at each scrape. Ray adds the process' `WorkerId`,
on which its dashboard joins Serve's names. No work per token: totals are told once a second,
histograms once a request. Ray forgets a gauge that is not told again for a while, so an idle
replica goes on telling.
"""

from __future__ import annotations

from typing import Protocol

from serve.messages import ReplicaStats, Summary
from serve.metrics import NO_LABEL, READINGS, Reading

REPORT_S = 1.0

# Upper bounds of buckets. Ray sums a histogram from the middles of its buckets: many of them.
_SECONDS = [base * 10**power / 1000 for power in range(6) for base in (1, 2, 3, 5)]
_TOKENS = [float(base << power) for power in range(17) for base in (2, 3)]


class Instrument(Protocol):
    """Where values of one metric go."""

    def set_default_tags(self, default_tags: dict[str, str]) -> object:
        """Labels of every value."""
        ...


class Gauge(Instrument, Protocol):
    """A value that goes up and down."""

    def set(self, value: float | None, tags: dict[str, str]) -> None:
        """Replace the value."""
        ...


class Counter(Instrument, Protocol):
    """A total."""

    def inc(self, value: float, tags: dict[str, str]) -> None:
        """Add `value` > 0."""
        ...


class Histogram(Instrument, Protocol):
    """How often a value fell into which bucket."""

    def observe(self, value: float, tags: dict[str, str]) -> None:
        """Count `value`."""
        ...


class Instruments(Protocol):
    """Makes instruments: the module `ray.util.metrics` is one."""

    def Gauge(self, name: str, description: str, tag_keys: tuple[str, ...]) -> Gauge:
        """Make a gauge."""
        ...

    def Counter(self, name: str, description: str, tag_keys: tuple[str, ...]) -> Counter:
        """Make a counter; Prometheus sees `name` with `_total` behind it."""
        ...

    def Histogram(
        self, name: str, description: str, boundaries: list[float], tag_keys: tuple[str, ...]
    ) -> Histogram:
        """Make a histogram."""
        ...


class ReplicaMetrics:
    """One replica's instruments; every value has the labels model_name, application, replica."""

    def __init__(
        self, instruments: Instruments, *, model: str, application: str, replica_id: str
    ) -> None:
        labels = {"model_name": model, "application": application, "replica": replica_id}
        self._gauges: list[tuple[Reading, Gauge]] = []
        self._counters: list[tuple[Reading, Counter]] = []
        self._told: dict[tuple[str, str], float] = {}
        for reading in READINGS:
            name = f"{reading.family}_{reading.name}"
            keys = (*labels, *([reading.label] if reading.label else []))
            if reading.is_total:
                counter = instruments.Counter(name, reading.text, keys)
                counter.set_default_tags(labels)
                self._counters.append((reading, counter))
            else:
                gauge = instruments.Gauge(name, reading.text, keys)
                gauge.set_default_tags(labels)
                self._gauges.append((reading, gauge))

        def histogram(name: str, text: str, boundaries: list[float]) -> Histogram:
            made = instruments.Histogram(f"vllm_{name}", text, boundaries, tuple(labels))
            made.set_default_tags(labels)
            return made

        self._e2e = histogram("e2e_request_latency_seconds", "Admission to end.", _SECONDS)
        self._ttft = histogram("time_to_first_token_seconds", "Admission to first token.", _SECONDS)
        self._tpot = histogram(
            "request_time_per_output_token_seconds", "Mean gap between tokens.", _SECONDS
        )
        self._prompt = histogram("request_prompt_tokens", "Prompt tokens.", _TOKENS)
        self._output = histogram("request_generation_tokens", "Tokens generated.", _TOKENS)

    def tell(self, stats: ReplicaStats) -> None:
        """Set the gauges, and advance the counters by what came since the last call."""
        for reading, gauge in self._gauges:
            for label, value in reading.read(stats).items():
                gauge.set(value, _tags(reading, label))
        for reading, counter in self._counters:
            for label, total in reading.read(stats).items():
                key = (reading.name, label)
                increase = total - self._told.get(key, 0.0)
                if increase > 0:
                    counter.inc(increase, _tags(reading, label))
                    self._told[key] = total

    def observe(self, summary: Summary) -> None:
        """Count an answered request in the histograms; those that failed or left are not."""
        if not {"stop", "length"}.issuperset(summary.finish_reasons):
            return
        num_choices, num_tokens = len(summary.finish_reasons), summary.num_completion_tokens
        self._e2e.observe(summary.duration_s, {})
        self._prompt.observe(summary.num_prompt_tokens, {})
        self._output.observe(num_tokens, {})
        if summary.ttft_s is not None:
            self._ttft.observe(summary.ttft_s, {})
            num_gaps = num_tokens / num_choices - 1
            if num_gaps > 0:
                self._tpot.observe((summary.duration_s - summary.ttft_s) / num_gaps, {})


def _tags(reading: Reading, label: str) -> dict[str, str]:
    return {} if label == NO_LABEL else {reading.label: label}
