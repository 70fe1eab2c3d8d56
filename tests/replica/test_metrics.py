"""What a replica tells Ray's metrics."""

import pytest

from serve.messages import FinishReason, Load, Prediction, ReplicaStats, Summary
from serve.replica.metrics import ReplicaMetrics
from serve.testing.instruments import RecordingInstruments

LABELS = {"model_name": "m", "application": "model-m", "replica": "r1"}


@pytest.fixture
def instruments() -> RecordingInstruments:
    return RecordingInstruments()


@pytest.fixture
def metrics(instruments: RecordingInstruments) -> ReplicaMetrics:
    return ReplicaMetrics(instruments, model="m", application="model-m", replica_id="r1")


def _stats(load: Load, **fields: object) -> ReplicaStats:
    return ReplicaStats("m", "r1", True, load, **fields)  # type: ignore[arg-type]


def _summary(*reasons: FinishReason, num_tokens: int = 5, ttft_s: float | None = 0.5) -> Summary:
    return Summary(1, list(reasons), 7, num_tokens, None, duration_s=2.5, ttft_s=ttft_s)


def test_every_value_has_the_replica_s_labels(
    instruments: RecordingInstruments, metrics: ReplicaMetrics
) -> None:
    prediction = Prediction({"1": 80.0, "8": 500.0}, 0.1)
    load = Load(1, 2, 3, 4, 5, 60, 7, 8, 9, 10, 11, 12, 13)
    metrics.tell(_stats(load, requests_total={"stop": 1}, prediction=prediction))
    metrics.observe(_summary("stop"))
    told = [
        dict(labels)
        for metric in instruments.made.values()
        for labels in [*metric.values, *metric.observed]
    ]
    assert len(told) > len(instruments.made) - 2
    for labels in told:
        assert LABELS.items() <= labels.items()


def test_a_total_is_told_as_what_came_since_the_last_time(
    instruments: RecordingInstruments, metrics: ReplicaMetrics
) -> None:
    for total in (0, 4, 4, 9):
        metrics.tell(
            _stats(Load(num_generation_tokens_total=total), requests_total={"stop": total})
        )
    assert instruments.value("vllm_generation_tokens") == 9
    assert instruments.value("vllm_request_success", finished_reason="stop") == 9
    assert instruments.value("vllm_request_success", finished_reason="abort") is None


def test_gauges_are_told_again_each_time(
    instruments: RecordingInstruments, metrics: ReplicaMetrics
) -> None:
    metrics.tell(_stats(Load(num_running=3, num_waiting=2, num_used_blocks=1, num_total_blocks=4)))
    assert instruments.value("vllm_num_requests_running") == 3
    assert instruments.value("vllm_num_requests_waiting") == 2
    assert instruments.value("vllm_kv_cache_usage_perc") == 0.25
    assert instruments.value("shoal_replica_ready") == 1
    metrics.tell(ReplicaStats("m", "r1", False, Load()))
    assert instruments.value("vllm_num_requests_running") == 0
    assert instruments.value("vllm_kv_cache_usage_perc") == 0
    assert instruments.value("shoal_replica_ready") == 0


def test_the_prefix_cache_is_told_under_vllm_s_names(
    instruments: RecordingInstruments, metrics: ReplicaMetrics
) -> None:
    load = Load(
        num_used_blocks=2,
        num_total_blocks=10,
        num_cached_blocks=5,
        num_evicted_blocks_total=4,
        num_cache_query_tokens_total=300,
        num_cache_hit_tokens_total=96,
    )
    metrics.tell(_stats(load))
    assert instruments.value("vllm_prefix_cache_queries") == 300
    assert instruments.value("vllm_prefix_cache_hits") == 96
    assert instruments.value("vllm_prompt_tokens_cached") == 96
    assert instruments.value("vllm_kv_cache_usage_perc") == 0.2
    states = [instruments.value("shoal_kv_blocks", state=s) for s in ("used", "cached", "free")]
    assert states == [2, 5, 3]
    assert instruments.value("shoal_kv_blocks_evicted") == 4


def test_a_prediction_is_told_by_batch_and_nothing_without_one(
    instruments: RecordingInstruments, metrics: ReplicaMetrics
) -> None:
    name = "shoal_predicted_decode_tokens_per_second"
    metrics.tell(_stats(Load()))
    assert instruments.value(name, batch="1") is None
    metrics.tell(_stats(Load(), prediction=Prediction({"1": 80.0, "64": 900.0}, 0.1)))
    assert instruments.value(name, batch="1") == 80
    assert instruments.value(name, batch="64") == 900
    assert instruments.value("shoal_predicted_time_to_first_token_seconds") == 0.1


def test_an_answer_is_counted_once_in_each_histogram(
    instruments: RecordingInstruments, metrics: ReplicaMetrics
) -> None:
    metrics.observe(_summary("length", num_tokens=5))
    assert instruments.observed("vllm_e2e_request_latency_seconds") == [2.5]
    assert instruments.observed("vllm_time_to_first_token_seconds") == [0.5]
    assert instruments.observed("vllm_request_time_per_output_token_seconds") == [0.5]
    assert instruments.observed("vllm_request_prompt_tokens") == [7]
    assert instruments.observed("vllm_request_generation_tokens") == [5]


def test_the_gap_between_tokens_is_that_of_one_choice(
    instruments: RecordingInstruments, metrics: ReplicaMetrics
) -> None:
    metrics.observe(_summary("stop", "stop", num_tokens=10))
    metrics.observe(_summary("stop", num_tokens=1))
    assert instruments.observed("vllm_request_time_per_output_token_seconds") == [0.5]


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_request_that_failed_or_left_is_in_no_histogram(
    instruments: RecordingInstruments, metrics: ReplicaMetrics, reason: FinishReason
) -> None:
    metrics.observe(_summary("stop", reason))
    assert instruments.observed("vllm_e2e_request_latency_seconds") == []


def test_a_migrated_request_has_no_first_token_here(
    instruments: RecordingInstruments, metrics: ReplicaMetrics
) -> None:
    metrics.observe(_summary("stop", ttft_s=None))
    assert instruments.observed("vllm_time_to_first_token_seconds") == []
    assert instruments.observed("vllm_e2e_request_latency_seconds") == [2.5]
