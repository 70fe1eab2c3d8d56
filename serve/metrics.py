"""Every metric of a replica: its name, what it counts, and how it is read from `ReplicaStats`.

Not an exporter. Two of them read this one table, so that their names cannot drift apart: the
ingress' `/metrics` (`vllm:...`, `shoal:...`) and Ray's metrics port (`ray_vllm_...`,
`ray_shoal_...`). The `vllm` names are those that dashboards and routers made for vLLM read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from serve.messages import FinishReason, ReplicaStats

NO_LABEL = ""


@dataclass(frozen=True, slots=True)
class Reading:
    """A gauge, or a counter where `is_total`; the names of counters lack the suffix `_total`.

    `read` gives values by the value of the one label beside the replica's own, `label`; a metric
    without such a label has the single key `NO_LABEL`.
    """

    family: Literal["vllm", "shoal"]
    name: str
    text: str
    read: Callable[[ReplicaStats], Mapping[str, float]]
    label: str = NO_LABEL
    is_total: bool = False


def _one(read: Callable[[ReplicaStats], float]) -> Callable[[ReplicaStats], Mapping[str, float]]:
    return lambda stats: {NO_LABEL: read(stats)}


def _requests(stats: ReplicaStats) -> Mapping[str, float]:
    return {reason: stats.requests_total.get(reason, 0) for reason in get_args(FinishReason)}


def _kv_blocks(stats: ReplicaStats) -> Mapping[str, float]:
    load = stats.load
    num_free = load.num_total_blocks - load.num_used_blocks - load.num_cached_blocks
    return {"used": load.num_used_blocks, "cached": load.num_cached_blocks, "free": num_free}


def _predicted_speeds(stats: ReplicaStats) -> Mapping[str, float]:
    return {} if stats.prediction is None else stats.prediction.decode_tokens_per_s


def _predicted_ttft(stats: ReplicaStats) -> Mapping[str, float]:
    return {} if stats.prediction is None else {NO_LABEL: stats.prediction.ttft_s}


READINGS: tuple[Reading, ...] = (
    Reading(
        "vllm",
        "num_requests_running",
        "Sequences in a step.",
        _one(lambda stats: stats.load.num_running),
    ),
    Reading(
        "vllm",
        "num_requests_waiting",
        "Sequences that wait.",
        _one(lambda stats: stats.load.num_waiting),
    ),
    Reading(
        "vllm",
        "kv_cache_usage_perc",
        "KV blocks in use, 1 is all.",
        _one(lambda stats: stats.load.num_used_blocks / max(1, stats.load.num_total_blocks)),
    ),
    Reading(
        "vllm",
        "prompt_tokens",
        "Prompt tokens taken in.",
        _one(lambda stats: stats.load.num_prompt_tokens_total),
        is_total=True,
    ),
    Reading(
        "vllm",
        "prompt_tokens_cached",
        "Prompt tokens that need not be computed.",
        _one(lambda stats: stats.load.num_cache_hit_tokens_total),
        is_total=True,
    ),
    Reading(
        "vllm",
        "generation_tokens",
        "Tokens generated.",
        _one(lambda stats: stats.load.num_generation_tokens_total),
        is_total=True,
    ),
    Reading(
        "vllm",
        "num_preemptions",
        "Sequences preempted.",
        _one(lambda stats: stats.load.num_preemptions_total),
        is_total=True,
    ),
    Reading(
        "vllm",
        "prefix_cache_queries",
        "Tokens looked up in the prefix cache.",
        _one(lambda stats: stats.load.num_cache_query_tokens_total),
        is_total=True,
    ),
    Reading(
        "vllm",
        "prefix_cache_hits",
        "Tokens found in the prefix cache.",
        _one(lambda stats: stats.load.num_cache_hit_tokens_total),
        is_total=True,
    ),
    Reading(
        "vllm",
        "request_success",
        "Choices ended.",
        _requests,
        label="finished_reason",
        is_total=True,
    ),
    Reading(
        "shoal",
        "replica_ready",
        "1 while the replica's shards serve, else 0.",
        _one(lambda stats: float(stats.is_ready)),
    ),
    Reading(
        "shoal",
        "replica_rebuilds",
        "Times that a replica made its shards anew.",
        _one(lambda stats: stats.num_rebuilds_total),
        is_total=True,
    ),
    Reading(
        "shoal",
        "kv_blocks",
        "KV blocks: in use, cached for later requests, or free.",
        _kv_blocks,
        label="state",
    ),
    Reading(
        "shoal",
        "kv_blocks_evicted",
        "Cached KV blocks that were given up for others.",
        _one(lambda stats: stats.load.num_evicted_blocks_total),
        is_total=True,
    ),
    Reading(
        "shoal",
        "predicted_decode_tokens_per_second",
        "Tokens a second of all sequences together that the plan expects at a batch size.",
        _predicted_speeds,
        label="batch",
    ),
    Reading(
        "shoal",
        "predicted_time_to_first_token_seconds",
        "Time to the first token that the plan expects on an idle replica.",
        _predicted_ttft,
    ),
)
