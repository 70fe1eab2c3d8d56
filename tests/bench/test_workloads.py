from dataclasses import replace

import pytest

from cluster.plan.shapes import published_shape
from cluster.planner.machine import Machine
from cluster.planner.prediction import measured_cpu
from cluster.planner.speed import CPU_CALIBRATION, TORCH_CALIBRATION
from scripts.bench.peers.protocol import Run
from scripts.bench.probes import Limits, Probes, between
from scripts.bench.workloads import Workload, workloads

SHAPE = published_shape("Qwen/Qwen2.5-0.5B-Instruct")
LIMITS = Limits(
    num_threads=2,
    vector_bytes=32,
    read_bytes_per_s=30e9,
    f32_flops=200e9,
    bf16_flops=0.0,
    tile_flops=0.0,
)


def limit(workload: Workload, limits: Limits = LIMITS) -> float:
    assert SHAPE is not None
    return workload.limit_tokens_per_s(SHAPE, limits)


def test_one_sequence_is_limited_by_the_bytes_of_the_weights() -> None:
    one = workloads(is_quick=False)[0]
    # 0.99 GB of weights, and some kilobytes of keys and values.
    assert limit(one) == pytest.approx(30e9 / 0.988e9, rel=0.01)
    assert limit(one, replace(LIMITS, f32_flops=400e9)) == limit(one)


def test_prompt_is_limited_by_arithmetic() -> None:
    prefill = next(workload for workload in workloads(is_quick=False) if workload.is_prefill)
    assert limit(prefill) == pytest.approx(200e9 / (2 * 358e6), rel=0.1)
    assert limit(prefill, replace(LIMITS, bf16_flops=400e9)) == pytest.approx(2 * limit(prefill))


def test_long_context_lowers_the_limit_by_its_keys_and_values() -> None:
    *_, long = workloads(is_quick=False)
    ratio = limit(long) / limit(replace(long, prompt_tokens=32))
    assert ratio == pytest.approx(0.988 / (0.988 + 8_192 * 12_288 / 1e9), rel=0.01)


def test_speed_of_decoding_leaves_the_prompt_out() -> None:
    run = Run(first_s=5.0, rest_s=2.0, num_rest_tokens=64, token_ids=[])
    assert Workload("decode", 4, 32, 17).tokens_per_s(run) == 32.0
    assert Workload("prefill", 1, 1_000, 1).tokens_per_s(run) == 200.0


def test_speed_of_prompts_that_never_decode_at_once_is_not_known() -> None:
    run = Run(first_s=5.0, rest_s=0.0, num_rest_tokens=0, token_ids=[])
    assert Workload("decode", 4, 32, 17).tokens_per_s(run) is None


def test_every_engine_gets_the_same_prompts_and_each_round_of_prefill_new_ones() -> None:
    decode, prefill = workloads(is_quick=True)[0], workloads(is_quick=True)[3]
    assert decode.prompts(1) == decode.prompts(2)
    assert prefill.prompts(1) == prefill.prompts(1) != prefill.prompts(2)


def test_limits_between_two_are_the_mean_of_each_kind() -> None:
    after = replace(LIMITS, read_bytes_per_s=40e9, f32_flops=100e9)
    found = between(LIMITS, after)
    assert (found.read_bytes_per_s, found.f32_flops, found.bf16_flops) == (35e9, 150e9, 0.0)


def test_probe_measures_bursts_and_what_is_sustained() -> None:
    with Probes(1, num_bytes=1 << 22) as probes:
        assert "stream" in probes.way
        found = [probes.burst(num_read_passes=1), probes.sustained(0.02)]
    for limits in found:
        assert 1e7 < limits.read_bytes_per_s < 1e13
        assert 1e7 < limits.flops < 1e14


@pytest.mark.parametrize(
    ("machine_kernels", "asked", "expected"),
    [
        (("avx2",), "auto", CPU_CALIBRATION),
        (("avx2",), "torch", TORCH_CALIBRATION),
        ((), "auto", TORCH_CALIBRATION),
    ],
)
def test_plan_expects_torchs_speed_where_no_kernels_run(
    machine_kernels: tuple[str, ...], asked: str, expected: object
) -> None:
    machine = Machine(num_cores=1, has_bfloat16=False, kernels=machine_kernels)
    assert measured_cpu(machine, asked).calibration == expected
