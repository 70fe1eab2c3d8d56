"""The roofline against its limits, against a slow twin, and against speeds that others measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.planner.accelerators import known_gpus
from cluster.planner.hardware import cpu_device, gpu_device
from cluster.planner.speed import GPU_CALIBRATION, Calibration, Roofline
from cluster.planner.subjects import find_subject
from scripts.bench.plan_error import Figure, fit, held_out, published_figures

SEVEN = find_subject("qwen2.5-7b-instruct").shape
PERFECT = Calibration(bandwidth_share=1.0, flops_share=1.0, layer_s=0.0)
FIGURES = published_figures()


def roofline(gpu: str, size: int = 1, calibration: Calibration = GPU_CALIBRATION) -> Roofline:
    device = replace(gpu_device(known_gpus()[gpu]), calibration=calibration)
    return Roofline(SEVEN, size, device)


@pytest.mark.parametrize(("gpu", "limit"), [("rtx4090d", 71), ("a100-80gb", 144), ("h200", 339)])
def test_nothing_is_faster_than_reading_the_weights(gpu: str, limit: int) -> None:
    assert round(roofline(gpu, calibration=PERFECT).tokens_per_s(1, 0)) == limit
    assert roofline(gpu).tokens_per_s(1, 0) < limit


def test_four_4090d_without_links_would_reach_the_limit_of_the_design() -> None:
    device = replace(
        gpu_device(known_gpus()["rtx4090d"]), calibration=PERFECT, link_s=0, link_bytes_per_s=1e30
    )
    assert round(Roofline(SEVEN, 4, device).tokens_per_s(1, 0)) == 285


def test_terms_are_those_of_a_count_by_hand() -> None:
    step = roofline("a100-80gb", 2).decode(8, 1_000)
    bandwidth, flops = 0.82 * 2039e9, 0.62 * 312e12
    hidden, layers, ffn, vocab = 3584, 28, 18944, 152064
    kv_width = 2 * 2 * 128
    layer = 2 * (hidden * hidden // 2) + 2 * hidden * kv_width // 2 + 3 * hidden * ffn // 2
    small = layers * (2 * hidden + (hidden + 2 * 512) // 2) + hidden
    weights = 2 * (layers * layer + small + vocab // 2 * hidden)
    assert step.weights_s == pytest.approx(weights / bandwidth)
    assert step.kv_s == pytest.approx(8 * 1_000 * 57_344 / 2 / bandwidth)
    products = 2 * (6_525_621_760 + vocab * hidden) + 4 * layers * hidden * 1_000
    assert step.flops_s == pytest.approx(8 * products / 2 / flops)
    reduce_s = 10e-6 + 8 * hidden * 2 / (0.7 * 300e9)
    assert step.all_reduce_s == pytest.approx(57 * reduce_s)
    assert step.launch_s == pytest.approx(28 * 115e-6)
    expected = max(step.weights_s + step.kv_s, step.flops_s) + step.all_reduce_s + step.launch_s
    assert step.seconds == expected


def test_batches_and_prompts_cost_what_they_hold() -> None:
    line = roofline("rtx4090")
    speeds = [line.tokens_per_s(batch, 2_048) for batch in (1, 8, 64)]
    assert speeds == sorted(speeds)
    assert speeds[2] < 64 * speeds[0]
    assert line.prefill_s(2_048, 512) > line.prefill_s(1_024, 512) > line.decode(1, 0).seconds
    assert line.prefill_s(2_048, 512) > line.prefill_s(2_048, 2_048)


def test_ranks_on_one_cpu_share_its_memory() -> None:
    device = cpu_device(bandwidth_bytes_per_s=30e9, flops_per_s=200e9)
    one, two = (Roofline(SEVEN, size, device).decode(1, 0) for size in (1, 2))
    assert two.weights_s == pytest.approx(one.weights_s, rel=1e-3)
    assert two.flops_s == one.flops_s
    assert two.all_reduce_s > one.all_reduce_s == 0


def test_cpu_hides_the_shorter_of_reading_and_computing_in_part_and_attends_afterwards() -> None:
    calibration = Calibration(
        bandwidth_share=0.5, flops_share=1.0, layer_s=0.0, attention_share=0.25, exposed_share=0.2
    )
    device = cpu_device(bandwidth_bytes_per_s=60e9, flops_per_s=100e9, calibration=calibration)
    line = Roofline(SEVEN, 1, device)
    for batch, context in ((1, 0), (16, 0), (1, 32_768), (16, 4_096)):
        step = line.decode(batch, context)
        attention_s = 4 * 28 * 3584 * batch * context / 25e9
        phases = ((step.weights_s, step.flops_s - attention_s), (step.kv_s, attention_s))
        expected = sum(max(phase) + 0.2 * min(phase) for phase in phases)
        assert step.seconds == pytest.approx(expected)
    wholly = replace(calibration, attention_share=None, exposed_share=0.0)
    hidden = replace(line, device=replace(device, calibration=wholly)).decode(16, 4_096)
    assert hidden.seconds == max(hidden.weights_s + hidden.kv_s, hidden.flops_s)


def test_calibration_is_what_the_calibrating_figures_ask_for() -> None:
    fitted = fit(FIGURES)
    assert fitted.bandwidth_share == pytest.approx(GPU_CALIBRATION.bandwidth_share, rel=0.01)
    assert fitted.flops_share == pytest.approx(GPU_CALIBRATION.flops_share, rel=0.01)
    assert fitted.layer_s == pytest.approx(GPU_CALIBRATION.layer_s, rel=0.01)


def error(figure: Figure) -> float:
    return abs(figure.predict() / figure.tokens_per_s - 1)


def test_a100_serves_the_7b_at_the_published_84_tokens_a_second() -> None:
    (figure,) = [figure for figure in FIGURES if figure.tokens_per_s == 84.28]
    assert (figure.gpu, figure.num_gpus) == ("a100-80gb", 1)
    assert error(figure) < 0.05


def test_models_and_sizes_that_the_fit_has_not_seen_are_within_10_percent() -> None:
    unseen = [
        figure
        for figure in FIGURES
        if figure.model.startswith("Qwen/") and held_out(figure, FIGURES) == "model"
    ]
    assert {figure.num_gpus for figure in unseen} == {1, 2, 4}
    assert max(map(error, unseen)) < 0.10


def test_longer_prompts_than_the_fit_has_seen_are_within_25_percent() -> None:
    longer = [figure for figure in FIGURES if held_out(figure, FIGURES) == "length"]
    assert len(longer) >= 6
    assert max(map(error, longer)) < 0.25


def test_gpu_and_model_that_the_code_does_not_know_are_within_20_percent() -> None:
    unknown = [figure for figure in FIGURES if "unknown" in held_out(figure, FIGURES)]
    assert {figure.gpu for figure in unknown} == {"rtx3090", "rtx-a6000"}
    assert {figure.model for figure in unknown} == {"llama-3-8b"}
    assert not {"rtx3090", "rtx-a6000"} & set(known_gpus())
    assert max(map(error, unknown)) < 0.20
