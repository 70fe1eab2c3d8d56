"""What `shoal up` says about this machine, and what it refuses before anything starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.planner import Machine, check_local, explain, resolve
from cluster.planner.machine import FoundGpu
from serve.config import HardwareConfig, ModelConfig, ShoalConfig
from serve.errors import ConfigurationError
from tests.planner.conftest import MakeModel

MACHINE = Machine(2, has_bfloat16=False, total_bytes=8 << 30, available_bytes=4 << 30)


def resolved(machine: Machine, *models: ModelConfig, **fields: object) -> ShoalConfig:
    return resolve(ShoalConfig.model_validate({"models": models, **fields}), machine)


def test_what_fits_is_told_with_its_split_threads_and_type(make_model: MakeModel) -> None:
    config = resolved(MACHINE, ModelConfig(path=make_model()))
    check_local(config, MACHINE)
    assert explain(config, MACHINE) == [
        "CPU, 2 cores, 4.3 GB free: small with TP 2, 1 thread a shard, float32 (this CPU has no"
        " bfloat16 units): two shards use all cores and batch better than one"
    ]


def test_kernels_that_the_cpu_lacks_are_refused_with_those_it_has(make_model: MakeModel) -> None:
    machine, model = replace(MACHINE, kernels=("avx2",)), ModelConfig(path=make_model())
    config = resolved(machine, model, hardware={"kernels": "amx"})
    with pytest.raises(ConfigurationError, match=r"kernels is amx, .* may be auto, torch, avx2"):
        check_local(config, machine)
    for kernels in ("torch", "avx2"):
        check_local(resolved(machine, model, hardware={"kernels": kernels}), machine)


def test_weights_and_least_cache_beyond_the_memory_are_refused_with_numbers(
    make_model: MakeModel,
) -> None:
    config = resolved(MACHINE, ModelConfig(path=make_model()))
    with pytest.raises(ConfigurationError) as caught:
        check_local(config, replace(MACHINE, available_bytes=10_000))
    assert "do not fit in memory: small: 0.0 GB of weights (float32)" in caught.value.message
    assert "free are 0.0 GB. What would fit:" in caught.value.message


def test_copies_count_each(make_model: MakeModel) -> None:
    model = ModelConfig(path=make_model(), replicas={"min": 8, "max": 8})
    config = resolved(MACHINE, model)
    one = resolved(MACHINE, ModelConfig(path=model.path))
    barely = replace(MACHINE, available_bytes=4_000_000)
    check_local(one, barely)
    with pytest.raises(ConfigurationError, match=r"8 copies of .*What would fit: fewer copies"):
        check_local(config, barely)


def test_cache_that_was_asked_for_counts(make_model: MakeModel) -> None:
    model = ModelConfig(path=make_model(), engine={"kv_cache_tokens": 100_000_000})
    with pytest.raises(ConfigurationError, match="do not fit in memory"):
        check_local(resolved(MACHINE, model), MACHINE)


GPU = FoundGpu("NVIDIA GeForce RTX 4090 D", 24564 << 20)
GPU_MACHINE = replace(MACHINE, gpus=(GPU,) * 4)


def test_gpus_are_chosen_where_the_configuration_names_no_hardware(make_model: MakeModel) -> None:
    config = resolved(GPU_MACHINE, ModelConfig(path=make_model()))
    assert isinstance(config.hardware, HardwareConfig)
    assert (config.hardware.device, config.hardware.gpus_per_node) == ("cuda", 4)
    check_local(config, GPU_MACHINE)
    [line] = explain(config, GPU_MACHINE)
    assert line.startswith("GPU, 4 x NVIDIA GeForce RTX 4090 D: small with TP ")
    assert line.endswith(", bfloat16")


def test_gpus_stay_unused_where_the_configuration_says_cpu(make_model: MakeModel) -> None:
    model = ModelConfig(path=make_model())
    written = ShoalConfig(models=(model,), hardware=HardwareConfig())
    config = resolve(written, GPU_MACHINE)
    check_local(config, GPU_MACHINE)
    assert explain(config, GPU_MACHINE)[-1] == (
        "Found 4 x NVIDIA GeForce RTX 4090 D, which stay unused: name them as `hardware` in a"
        " configuration file."
    )


def test_a_gpu_that_no_table_has_leaves_the_cpu(make_model: MakeModel) -> None:
    machine = replace(MACHINE, gpus=(FoundGpu("Some Card", 8 << 30),))
    config = resolved(machine, ModelConfig(path=make_model()))
    assert isinstance(config.hardware, HardwareConfig)
    assert config.hardware.device == "cpu"


@pytest.mark.parametrize(
    ("gpus", "options", "message"),
    [
        ((), {}, "this machine has no GPU that nvidia-smi lists. Use `hardware: cpu`"),
        ((GPU,), {"replicas": {"min": 2, "max": 2}}, r"2 in all \(small: 2\), and .* has 1"),
        ((FoundGpu("NVIDIA H200", 1000),), {}, "small does not fit: a shard has 0.0 GB"),
    ],
)
def test_gpus_that_are_missing_too_few_or_too_small_are_refused_before_a_start(
    make_model: MakeModel, gpus: tuple[FoundGpu, ...], options: dict[str, Any], message: str
) -> None:
    config = resolved(GPU_MACHINE, ModelConfig(path=make_model(), tensor_parallel=1, **options))
    with pytest.raises(ConfigurationError, match=message):
        check_local(config, replace(MACHINE, gpus=gpus))


def test_machine_whose_memory_is_not_known_refuses_nothing(make_model: MakeModel) -> None:
    config = resolved(MACHINE, ModelConfig(path=make_model()))
    check_local(config, Machine(2, has_bfloat16=False))
