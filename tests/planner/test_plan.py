"""Which layout is chosen and why, what is refused, and what is offered in its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.plan import configs_path, load_config, preset_names
from cluster.planner import predict
from cluster.planner.accelerators import known_gpus
from cluster.planner.hardware import Node, cpu_device, cpu_node, find_hardware, gpu_node
from cluster.planner.machine import Machine
from cluster.planner.plan import ModelPlan, plan_model
from cluster.planner.subjects import find_subject, subjects_of
from serve.config import HardwareConfig, ModelConfig
from serve.errors import ConfigurationError

SEVEN = find_subject("qwen2.5-7b-instruct")
LAPTOP = Machine(4, has_bfloat16=False, total_bytes=16 << 30, available_bytes=12 << 30)
SLOW_CPU = cpu_device(bandwidth_bytes_per_s=30e9, flops_per_s=200e9)


def node(text: str) -> Node:
    return gpu_node(*find_hardware(text))


def plan(model: str, hardware: str, **options: int) -> ModelPlan:
    return plan_model(find_subject(model), node(hardware), **options)


def test_eight_gpus_offer_the_7b_in_three_ways_and_say_why_one_wins() -> None:
    found = plan("qwen2.5-7b-instruct", "h100x8")
    working = {layout.size: layout for layout in found.layouts if layout.problem is None}
    assert {size: layout.num_replicas for size, layout in working.items()} == {1: 8, 2: 4, 4: 2}
    assert all(layout.yarn and layout.max_model_len == 131_072 for layout in working.values())
    (illegal,) = [layout for layout in found.layouts if layout.problem is not None]
    assert (illegal.size, illegal.problem) == (8, "not legal: 28 heads are not divisible by 8")
    assert found.chosen is working[4]
    assert "with TP 1" in found.reason
    assert "with TP 2" in found.reason
    assert "all-reduces" in found.reason


def test_box_of_four_4090d_is_taken_whole_for_the_long_context() -> None:
    found = plan("qwen2.5-7b-instruct", "rtx4090d-x4")
    assert found.chosen is not None
    assert (found.chosen.size, found.chosen.num_replicas) == (4, 1)
    assert (found.chosen.max_model_len, found.chosen.yarn) == (131_072, True)
    assert "131,072 tokens, as TP 1 and TP 2 do not" in found.reason


def test_one_a100_carries_the_7b_with_the_long_context() -> None:
    chosen = plan("qwen2.5-7b-instruct", "a100-80gb").chosen
    assert chosen is not None
    assert (chosen.size, chosen.max_model_len, chosen.yarn) == (1, 131_072, True)
    assert chosen.num_sequences(131_072) >= 4


def test_small_model_keeps_more_copies_rather_than_all_reduces() -> None:
    found = plan("qwen2.5-0.5b-instruct", "rtx4090d-x4")
    assert found.chosen is not None
    assert (found.chosen.size, found.chosen.num_replicas) == (1, 4)
    assert "copies lose less with a GPU" in found.reason


def test_size_that_was_asked_for_is_taken_though_another_is_faster() -> None:
    found = plan("qwen2.5-7b-instruct", "h100x8", size=1)
    assert found.chosen is not None
    assert (found.chosen.size, found.reason) == (1, "asked for")


@pytest.mark.parametrize(
    ("size", "reasons"),
    [(8, ["28 heads are not divisible by 8"]), (7, ["FFN size 18944", "4 KV heads and 7 shards"])],
)
def test_illegal_size_is_refused_with_every_reason(size: int, reasons: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="must be one of 1, 2, 4") as caught:
        plan("qwen2.5-7b-instruct", "h100x8", size=size)
    assert all(reason in caught.value.message for reason in reasons)


def test_length_beyond_the_positions_is_refused_with_the_limit() -> None:
    with pytest.raises(ConfigurationError, match="must be <= 131,072, the model's positions"):
        plan("qwen2.5-7b-instruct", "h100x8", max_model_len=200_000)
    with pytest.raises(ConfigurationError, match="must be <= 32,768"):
        plan("qwen2.5-3b-instruct", "h100x8", max_model_len=40_000)


def test_model_that_is_too_large_is_refused_with_numbers_and_with_what_would_fit() -> None:
    found = plan("qwen2.5-72b-instruct", "a100-80gb")
    assert found.chosen is None
    assert found.refused == (
        "TP 1: weights 145.4 GB + workspace 1.3 GB are more than the 85.0 GB usable"
    )
    assert found.would_fit == (
        "2 x a100-80gb with TP 2 (16,384 tokens)",
        "1 x b200 with TP 1 (32,768 tokens)",
        "the preset qwen2.5-32b-instruct with TP 1 (32,768 tokens) on the same hardware",
    )
    assert plan("qwen2.5-72b-instruct", "a100-80gbx2").chosen is not None
    assert plan("qwen2.5-72b-instruct", "b200").chosen is not None


def test_length_that_does_not_fit_is_told_with_the_one_that_does() -> None:
    found = plan("qwen2.5-7b-instruct", "rtx4090", max_model_len=131_072)
    assert found.refused is not None
    assert "less than one sequence of max_model_len 131,072" in found.refused
    assert found.would_fit[0] == "--max-model-len 32768 with TP 1 on the same hardware"
    assert plan("qwen2.5-7b-instruct", "rtx4090", max_model_len=32_768).chosen is not None


def test_machine_without_gpus_splits_in_two_and_is_offered_less_where_memory_ends() -> None:
    found = plan_model(find_subject("qwen2.5-1.5b-instruct"), cpu_node(LAPTOP, device=SLOW_CPU))
    assert found.chosen is not None
    assert (found.chosen.size, found.demand.bytes_per_value) == (2, 4)
    refused = plan_model(find_subject("qwen2.5-3b-instruct"), cpu_node(LAPTOP, device=SLOW_CPU))
    assert refused.chosen is None
    assert "dtype: bfloat16, which halves the weights" in refused.would_fit[0]
    assert "the preset qwen2.5-1.5b-instruct" in refused.would_fit[1]


@pytest.mark.parametrize("model", preset_names("models"))
def test_every_model_is_planned_on_every_gpu_and_the_plan_is_json(model: str) -> None:
    subject = find_subject(model)
    for name, gpu in known_gpus().items():
        for count in (1, 8):
            config = HardwareConfig(name=name, device="cuda", gpu=name, gpus_per_node=count)
            found = plan_model(subject, gpu_node(config, gpu))
            assert (found.chosen is None) == bool(found.refused)
            report = json.loads(json.dumps(found.to_dict()))
            chosen = [
                layout
                for layout in report["layouts"]
                if layout["tensor_parallel"] == report["chosen"]
            ]
            assert len(chosen) == (0 if found.chosen is None else 1)
            for layout in chosen:
                terms = layout["prediction"]["decode"]["1"]
                assert terms["tokens_per_s"] == pytest.approx(1 / terms["step_s"])
                assert layout["memory"]["kv_tokens"] >= layout["max_model_len"]


@pytest.mark.parametrize(
    "path", sorted((configs_path() / "examples").glob("*.yaml")), ids=lambda path: path.stem
)
def test_example_is_planned(path: Path) -> None:
    subjects = subjects_of(load_config(path, needs_weights=False))
    assert subjects
    for subject in subjects:
        assert plan_model(subject, cpu_node(LAPTOP, device=SLOW_CPU)).chosen is not None


def test_configuration_of_published_models_is_planned_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "shoal.yaml"
    path.write_text(
        "hardware: rtx4090d-x4\n"
        "models:\n"
        "  - {preset: qwen2.5-7b-instruct, tensor_parallel: 2, max_model_len: 65536}\n"
    )
    config = load_config(path, needs_weights=False)
    (subject,) = subjects_of(config)
    found = plan_model(subject, node("rtx4090d-x4"))
    assert found.chosen is not None
    assert (found.chosen.size, found.chosen.max_model_len, found.chosen.yarn) == (2, 65_536, True)
    with pytest.raises(ConfigurationError, match="does not come with its weights"):
        load_config(path)


def test_preset_s_illegal_size_is_a_problem_of_its_line(tmp_path: Path) -> None:
    path = tmp_path / "shoal.yaml"
    path.write_text("models:\n  - preset: qwen2.5-7b-instruct\n    tensor_parallel: 8\n")
    with pytest.raises(ConfigurationError) as caught:
        load_config(path, needs_weights=False)
    assert caught.value.message.startswith(f"{path}:3: models[0].tensor_parallel: must be one of")


def test_prediction_of_a_resolved_model_is_plain_data() -> None:
    model = ModelConfig(preset="qwen2.5-7b-instruct", name="x", tensor_parallel=1, dtype="bfloat16")
    hardware = HardwareConfig(name="a100-80gb", device="cuda", gpu="a100-80gb", gpus_per_node=1)
    found = predict(model, hardware)
    assert found is not None
    report = json.loads(json.dumps(found.to_dict()))
    assert set(report["decode"]) == {"1", "8", "64"}
    assert 75 < report["decode"]["1"]["tokens_per_s"] < 90
    assert report["ttft_s"] > 0
    assert predict(model, hardware.model_copy(update={"gpu": "unheard-of"})) is None
