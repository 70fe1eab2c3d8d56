from __future__ import annotations

from pathlib import Path

import pytest

from cluster.planner.accelerators import find_gpu, known_gpus
from cluster.planner.hardware import find_hardware
from cluster.planner.machine import FoundGpu, Machine
from cluster.planner.nodes import find_node
from serve.config import HardwareConfig
from serve.errors import ConfigurationError

CPU = Machine(2, has_bfloat16=False, total_bytes=8 << 30, available_bytes=6 << 30)
REQUIRED = (
    "rtx4090", "rtx4090d", "rtx5090", "l4", "l40s", "a10g", "a100-40gb", "a100-80gb", "h100",
    "h200", "b200",
)  # fmt: skip


@pytest.mark.parametrize("name", REQUIRED)
def test_gpu_has_its_figures_and_their_source(name: str) -> None:
    gpu = known_gpus()[name]
    assert gpu.source
    assert gpu.names
    assert 0.95 * gpu.total_bytes < gpu.usable_bytes < gpu.total_bytes
    assert 0.966 <= gpu.usable_bytes / gpu.total_bytes <= 1


def test_limits_of_the_design_follow_from_the_data_sheets() -> None:
    gb_s = {name: gpu.bandwidth_gb_s for name, gpu in known_gpus().items()}
    expected = {"rtx4090d": 71, "a100-80gb": 144, "h200": 339}
    assert {name: round(gb_s[name] / 14.14) for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("4090", "rtx4090"),
        ("RTX 4090 D", "rtx4090d"),
        ("NVIDIA GeForce RTX 4090 D", "rtx4090d"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("H100", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
    ],
)
def test_gpu_is_found_by_short_name_and_by_the_driver_s(text: str, name: str) -> None:
    assert find_gpu(text, known_gpus()) == known_gpus()[name]


def test_unknown_gpu_is_told_with_the_nearest_and_all_names() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'h100'") as caught:
        find_gpu("h10", known_gpus())
    assert all(name in caught.value.message for name in REQUIRED)


@pytest.mark.parametrize(("text", "count"), [("h100x8", 8), ("H100 x 2", 2), ("h100", 1)])
def test_hardware_is_a_gpu_with_a_count(text: str, count: int) -> None:
    config, gpu = find_hardware(text)
    assert (config.gpu, config.gpus_per_node, config.device) == ("h100", count, "cuda")
    assert gpu == known_gpus()["h100"]


def test_preset_of_hardware_wins_over_the_gpu_of_its_name() -> None:
    config, _ = find_hardware("a100-80gb")
    assert (config.name, config.gpus_per_node, config.has_spare) == ("a100-80gb", 1, False)
    config, _ = find_hardware("a100-80gbx8")
    assert (config.name, config.gpus_per_node) == ("a100-80gb-x8", 8)


def test_file_of_the_user_s_own_may_describe_its_gpu_inline(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\ngpus_per_node: 2\n"
        "gpu: {memory_mib: 49140, bandwidth_gb_s: 768, bf16_tflops: 154.8}\n"
    )
    config, gpu = find_hardware(str(path))
    assert (config.name, config.gpu, config.gpus_per_node) == ("mine", "mine", 2)
    assert gpu.bandwidth_gb_s == 768
    assert gpu.usable_bytes < gpu.total_bytes


def test_table_of_the_user_s_own_adds_gpus_and_wins(tmp_path: Path) -> None:
    path = tmp_path / "gpus.yaml"
    path.write_text("h20: {memory_mib: 97871, bandwidth_gb_s: 4000, bf16_tflops: 148}\n")
    config, gpu = find_hardware("h20x8", gpus_file=path)
    assert (config.gpu, config.gpus_per_node, gpu.bf16_tflops) == ("h20", 8, 148)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\ngpu: nope\n", "no GPU named 'nope'"),
        ("name: x\n", "gpu: is missing"),
        ("name: x\ngpu: {memory_mib: 9999}\n", "bandwidth_gb_s: field required"),
        ("name: x\ngpu: h100\nthreads: 3\n", "threads: extra inputs"),
        ("- a\n", "must be a mapping"),
        ("a: [", "cannot be read"),
    ],
)
def test_mistake_in_a_hardware_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        find_hardware(str(path))
    assert message in caught.value.message
    assert "bad.yaml" in caught.value.message or "nope" in caught.value.message


def test_nothing_said_means_this_machine_s_gpus() -> None:
    found = FoundGpu("NVIDIA L40S", 46068 << 20)
    machine = Machine(8, has_bfloat16=True, gpus=(found, found))
    node, origin = find_node(None, machine=machine)
    assert (node.num_gpus, node.config.gpu, origin) == (2, "l40s", "this machine's GPUs")


def test_gpu_that_nobody_described_is_told_and_the_cpu_planned() -> None:
    machine = Machine(2, False, 8 << 30, 6 << 30, gpus=(FoundGpu("NVIDIA TITAN Z", 6 << 30),))
    node, origin = find_node(None, machine=machine)
    assert node.num_gpus == 0
    assert "no GPU named 'NVIDIA TITAN Z'" in origin


def test_configuration_s_hardware_comes_before_the_machine_and_the_option_before_both() -> None:
    config = HardwareConfig(name="box", device="cuda", gpu="l4", gpus_per_node=4)
    node, _ = find_node(None, config=config, machine=CPU)
    assert (node.num_gpus, node.config.name) == (4, "box")
    node, _ = find_node("cpu", config=config, machine=CPU)
    assert (node.num_gpus, node.usable_bytes, node.num_cores) == (0, 6 << 30, 2)
