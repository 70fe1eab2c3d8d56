"""Prometheus text of every replica, under the names that vLLM's dashboards and routers read.

Not a registry of our own: a scrape asks the replicas, which own their totals, so that any of
several ingress processes gives the same figures and none is lost with an ingress.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from serve.messages import FinishReason, Load, ReplicaStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LABELS = ("model_name", "replica")

_GAUGES: tuple[tuple[str, str, Callable[[Load], float]], ...] = (
    ("vllm:num_requests_running", "Sequences in a step.", lambda load: load.num_running),
    ("vllm:num_requests_waiting", "Sequences that wait.", lambda load: load.num_waiting),
    (
        "vllm:kv_cache_usage_perc",
        "KV blocks in use, 1 is all.",
        lambda load: load.num_used_blocks / max(1, load.num_total_blocks),
    ),
)
_COUNTERS: tuple[tuple[str, str, Callable[[Load], float]], ...] = (
    ("vllm:prompt_tokens", "Prompt tokens taken in.", lambda load: load.num_prompt_tokens_total),
    (
        "vllm:generation_tokens",
        "Tokens generated.",
        lambda load: load.num_generation_tokens_total,
    ),
    ("vllm:num_preemptions", "Sequences preempted.", lambda load: load.num_preemptions_total),
)


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
        for name, text, read in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=_LABELS)
            for replica in self._stats:
                gauge.add_metric(_labels(replica), read(replica.load))
            yield gauge
        for name, text, read in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=_LABELS)
            for replica in self._stats:
                counter.add_metric(_labels(replica), read(replica.load))
            yield counter
        yield self._requests()
        yield self._rebuilds()

    def _requests(self) -> Metric:
        requests = CounterMetricFamily(
            "vllm:request_success", "Requests ended.", labels=(*_LABELS, "finished_reason")
        )
        for replica in self._stats:
            for reason in get_args(FinishReason):
                total = replica.requests_total.get(reason, 0)
                requests.add_metric([*_labels(replica), reason], total)
        return requests

    def _rebuilds(self) -> Metric:
        rebuilds = CounterMetricFamily(
            "shoal:replica_rebuilds", "Times that a replica made its shards anew.", labels=_LABELS
        )
        for replica in self._stats:
            rebuilds.add_metric(_labels(replica), replica.num_rebuilds_total)
        return rebuilds


def _labels(replica: ReplicaStats) -> list[str]:
    return [replica.model, replica.replica_id]
