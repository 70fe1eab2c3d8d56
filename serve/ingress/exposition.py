"""Prometheus text of every replica, under the names of `serve.metrics`.

Not a registry of our own: a scrape asks the replicas, which own their totals, so that any of
several ingress processes gives the same figures and none is lost with an ingress.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from serve.messages import ReplicaStats
from serve.metrics import READINGS, Reading

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LABELS = ("model_name", "replica")


def render_metrics(stats: Sequence[ReplicaStats]) -> bytes:
    """The exposition of `stats`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(stats))
    return generate_latest(registry)


class _Collector:
    def __init__(self, stats: Sequence[ReplicaStats]) -> None:
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        for reading in READINGS:
            metric = _family(reading)
            for stats in self._stats:
                for label, value in reading.read(stats).items():
                    labels = [stats.model, stats.replica_id, *([label] if reading.label else [])]
                    metric.add_metric(labels, value)
            yield metric


def _family(reading: Reading) -> CounterMetricFamily | GaugeMetricFamily:
    name = f"{reading.family}:{reading.name}"
    labels = [*_LABELS, *([reading.label] if reading.label else [])]
    if reading.is_total:
        return CounterMetricFamily(name, reading.text, labels=labels)
    return GaugeMetricFamily(name, reading.text, labels=labels)
