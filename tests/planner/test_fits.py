"""configs/fits.yaml, which the chart looks up: what the planner says, and usable as it is."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from cluster.plan import configs_path, preset_names
from scripts.fits import render
from serve.config import HardwareConfig, ModelConfig

FILE = configs_path() / "fits.yaml"
FITS: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
ENTRIES = [
    (model, hardware, size)
    for model, by_hardware in FITS.items()
    for hardware, fit in by_hardware.items()
    for size in fit["sizes"]
]


def preset(kind: str, name: str) -> dict[str, Any]:
    values = yaml.safe_load((configs_path() / kind / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {**base, **over}
    for key in base.keys() & over.keys():
        if isinstance(base[key], dict) and isinstance(over[key], dict):
            both[key] = merged(base[key], over[key])
    return both


def gib(text: str) -> int:
    found = re.fullmatch(r"(\d+)Gi", text)
    assert found is not None
    return int(found[1])


def test_file_is_what_the_planner_writes() -> None:
    assert FILE.read_text(encoding="utf-8") == render(), "run `python -m scripts.fits`"


def test_every_model_has_an_entry_for_every_hardware() -> None:
    assert sorted(FITS) == preset_names("models")
    for by_hardware in FITS.values():
        assert sorted(by_hardware) == preset_names("hardware")


@pytest.mark.parametrize(("model", "hardware", "size"), ENTRIES)
def test_size_makes_a_valid_configuration_without_auto(
    model: str, hardware: str, size: str
) -> None:
    entry = FITS[model][hardware]["sizes"][size]
    settings = ModelConfig.model_validate(merged(preset("models", model), entry["model"]))
    machine = HardwareConfig.model_validate(merged(preset("hardware", hardware), entry["hardware"]))
    assert settings.tensor_parallel == int(size)
    assert "auto" not in (settings.dtype, settings.max_model_len, settings.yarn)
    assert isinstance(machine.threads_per_shard, int)
    pod = machine.pod
    assert pod.cpu is not None
    assert pod.memory is not None
    assert pod.shm is not None
    assert gib(pod.shm) < gib(pod.memory)
    assert int(pod.cpu) >= int(size) * (machine.threads_per_shard if machine.device == "cpu" else 1)
    if machine.device == "cuda":
        assert int(size) <= machine.gpus_per_node


def test_chosen_is_one_of_the_sizes_or_refused_with_the_reason() -> None:
    for by_hardware in FITS.values():
        for fit in by_hardware.values():
            assert (fit["chosen"] in fit["sizes"]) == (fit["refused"] is None)
            assert bool(fit["sizes"]) == (fit["refused"] is None)
            assert not set(fit["sizes"]) & set(fit["unfit"])


@pytest.mark.parametrize(("hardware", "size"), [("a100-80gb", "1"), ("rtx4090d-x4", "4")])
def test_both_gpu_presets_carry_the_7b_with_the_whole_context(hardware: str, size: str) -> None:
    fit = FITS["qwen2.5-7b-instruct"][hardware]
    assert fit["chosen"] == size
    settings = fit["sizes"][size]["model"]
    assert (settings["max_model_len"], settings["yarn"]) == (131_072, True)


def test_box_of_four_takes_16_gib_of_shared_memory() -> None:
    pod = FITS["qwen2.5-7b-instruct"]["rtx4090d-x4"]["sizes"]["4"]["hardware"]["pod"]
    assert pod == {"cpu": "16", "memory": "64Gi", "shm": "16Gi"}
