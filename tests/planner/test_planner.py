from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.manifests import serve_applications
from cluster.plan import DEMO_MODEL_PATH, configs_path, load_config
from cluster.plan.shapes import published_configs
from cluster.planner import Machine, resolve
from serve.config import HardwareConfig, ModelConfig, ShoalConfig
from tests.planner.conftest import MakeModel

LAPTOP = Machine(num_cores=2, has_bfloat16=False)
SERVER = Machine(num_cores=32, has_bfloat16=True)


def plan(machine: Machine, *models: ModelConfig, **fields: Any) -> ShoalConfig:
    return resolve(ShoalConfig(models=models, **fields), machine)


def autos(value: Any, path: str = "") -> list[str]:
    """Where "auto" is still written."""
    if isinstance(value, dict):
        return [found for key, inner in value.items() for found in autos(inner, f"{path}.{key}")]
    if isinstance(value, list):
        return [found for inner in value for found in autos(inner, path)]
    return [path] if value == "auto" else []


def test_laptop_splits_in_two_on_one_thread_each(make_model: MakeModel) -> None:
    config = plan(LAPTOP, ModelConfig(path=make_model()))
    (model,) = config.models
    assert isinstance(config.hardware, HardwareConfig)
    assert (model.tensor_parallel, config.hardware.threads_per_shard) == (2, 1)
    assert (model.dtype, model.max_model_len, model.name) == ("float32", 2048, "small")
    assert config.ingress_copies == 1


@pytest.mark.parametrize(("kernels", "dtype"), [("auto", "bfloat16"), ("torch", "float32")])
def test_bfloat16_halves_the_bytes_that_kernels_read_and_slows_torch_down(
    make_model: MakeModel, kernels: str, dtype: str
) -> None:
    machine = Machine(num_cores=2, has_bfloat16=False, kernels=("avx2",))
    hardware = HardwareConfig(kernels=kernels)
    assert plan(machine, ModelConfig(path=make_model()), hardware=hardware).models[0].dtype == dtype


def test_server_uses_bfloat16_all_cores_and_two_ingress_copies(make_model: MakeModel) -> None:
    models = [ModelConfig(path=make_model(name), replicas={"min": 2, "max": 4}) for name in "ab"]
    config = plan(SERVER, *models)
    assert isinstance(config.hardware, HardwareConfig)
    assert config.hardware.threads_per_shard == 32 // 8
    assert (config.models[0].dtype, config.ingress_copies) == ("bfloat16", 2)


def test_model_that_cannot_be_halved_stays_whole(make_model: MakeModel) -> None:
    folder = make_model(num_attention_heads=1, num_key_value_heads=1)
    assert plan(LAPTOP, ModelConfig(path=folder)).models[0].tensor_parallel == 1


@pytest.mark.parametrize(("gpus_per_node", "size"), [(1, 1), (4, 4), (8, 4)])
def test_gpus_split_a_large_model_as_the_plan_says(
    make_model: MakeModel, gpus_per_node: int, size: int
) -> None:
    hardware = HardwareConfig(name="box", device="cuda", gpu="h100", gpus_per_node=gpus_per_node)
    folder = make_model("seven", **published_configs()["Qwen/Qwen2.5-7B-Instruct"])
    (model,) = plan(SERVER, ModelConfig(path=folder), hardware=hardware).models
    assert (model.tensor_parallel, model.dtype) == (size, "bfloat16")


def test_what_is_said_stays_said(make_model: MakeModel) -> None:
    written = ModelConfig(
        path=make_model(),
        name="x",
        tensor_parallel=4,
        dtype="bfloat16",
        max_model_len=64,
        yarn=False,
        engine={"token_budget": 64},
    )
    (model,) = plan(LAPTOP, written).models
    assert model == written


@pytest.mark.parametrize(("device", "budget"), [("cpu", 512), ("cuda", 2048)])
def test_step_has_more_room_for_prompts_on_a_gpu(
    make_model: MakeModel, device: str, budget: int
) -> None:
    hardware = HardwareConfig(name="box", device=device, gpu="h100", gpus_per_node=1)
    (model,) = plan(SERVER, ModelConfig(path=make_model()), hardware=hardware).models
    assert model.engine.token_budget == budget


def test_localhost_is_one_address_for_every_part(make_model: MakeModel) -> None:
    config = plan(LAPTOP, ModelConfig(path=make_model()), http={"host": "localhost"})
    assert config.http.host == "127.0.0.1"


def test_only_the_kv_cache_and_the_kernels_are_left_to_the_shard(make_model: MakeModel) -> None:
    config = plan(LAPTOP, ModelConfig(path=make_model()))
    assert autos(config.model_dump(mode="json")) == [
        ".hardware.kernels",
        ".models.engine.kv_cache_tokens",
    ]


def test_shards_are_told_of_kernels_that_somebody_chose(make_model: MakeModel) -> None:
    config = plan(LAPTOP, ModelConfig(path=make_model()), hardware={"kernels": "torch"})
    model, _ = serve_applications(config)["applications"]
    assert model["args"]["hardware"]["kernels"] == "torch"


@pytest.mark.skipif(
    not (DEMO_MODEL_PATH / "config.json").is_file(), reason="the demo model is not trained yet"
)
@pytest.mark.parametrize("machine", [LAPTOP, SERVER])
@pytest.mark.parametrize(
    "path", sorted((configs_path() / "examples").glob("*.yaml")), ids=lambda path: path.stem
)
def test_example_is_planned_down_to_the_request_that_deploys_it(
    path: Path, machine: Machine
) -> None:
    config = resolve(load_config(path), machine)
    body = json.loads(json.dumps(serve_applications(config)))
    names = [application["name"] for application in body["applications"]]
    assert len(set(names)) == len(config.models) + 1
