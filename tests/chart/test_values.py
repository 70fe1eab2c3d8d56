"""Values as types, as YAML and as a schema say the same; a configuration becomes values."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.helm_values import ChartValues, from_config, to_config
from cluster.helm_values.resolved import merge
from cluster.manifests import serve_applications
from cluster.plan import configs_path, load_config
from scripts.chart import generated_files
from serve import __version__
from serve.errors import ConfigurationError
from tests.chart.cases import CASES, KEYS, Case
from tests.chart.rendering import CHART, load_chart

EXAMPLES = sorted((configs_path() / "examples").glob("*.yaml"))


@pytest.mark.parametrize("name", ["values.yaml", "values.schema.json", "README.md"])
def test_generated_file_is_up_to_date(name: str) -> None:
    text = (CHART / name).read_text(encoding="utf-8")
    assert text == generated_files()[name], "run `python -m scripts.chart`"


def test_defaults_of_the_chart_are_those_of_the_types() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values == ChartValues().model_dump(mode="json", by_alias=True)


@pytest.mark.parametrize("case", CASES[::40], ids=str)
def test_helm_and_the_types_read_values_alike(case: Case) -> None:
    chart = load_chart(CHART)
    chart.validate_schema(case.values)
    merged = chart.merge_values(case.values)
    read = ChartValues.model_validate(merged)
    assert read == ChartValues.model_validate(case.values)


def test_schema_is_valid_and_accepts_the_defaults() -> None:
    arguments = ["--schemafile", str(CHART / "values.schema.json"), str(CHART / "values.yaml")]
    check = [sys.executable, "-m", "check_jsonschema", *arguments]
    subprocess.run(check, check=True, capture_output=True)


def test_versions_of_chart_image_and_ray_agree() -> None:
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert about["appVersion"] == __version__
    locked = (CHART.parents[1] / "requirements.txt").read_text().splitlines()
    (ray,) = [line for line in locked if line.startswith("ray==")]
    version = ray.removeprefix("ray==").split()[0]
    template = (CHART / "templates" / "rayservice.yaml").read_text()
    assert f"rayVersion: {version}\n" in template


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_becomes_values_or_says_which_key_cannot(path: Path) -> None:
    """Every example is of one machine: those with a host or sizes that differ are refused."""
    document = yaml.safe_load(path.read_text())
    document.get("http", {}).pop("host", None)
    for model in document["models"]:
        model["tensor_parallel"] = 1
    values = merge(from_config(document), {"auth": {"allowAnonymous": True}})
    values.setdefault("hardware", {"preset": "cpu"})
    config = to_config(ChartValues.model_validate(values))
    local = load_config(path)
    assert [model.name for model in config.models] == [model.name for model in local.models]
    replicas = [model.replicas for model in local.models]
    assert [model.replicas for model in config.models] == replicas
    assert serve_applications(config)["applications"][-1]["name"] == "shoal"


def test_every_key_that_a_cluster_cannot_use_is_named() -> None:
    document: dict[str, Any] = {
        "http": {"host": "127.0.0.1", "port": 9000, "keys_file": "keys.yaml"},
        "hardware": {"name": "a100-80gb", "device": "cuda", "has_spare": True, "upgrade": "None"},
        "models": [{"path": "weights"}, {"preset": "demo", "stand_in": {}}],
        "modles": 1,
    }
    with pytest.raises(ConfigurationError) as caught:
        from_config(document)
    keys = [line.split(": ")[0] for line in caught.value.message.splitlines()]
    assert keys == [
        "http.host",
        "http.keys_file",
        "hardware.device",
        "models[0].preset",
        "models[0].path",
        "models[1].stand_in",
        "modles",
    ]


def test_what_was_written_arrives_in_the_configuration() -> None:
    document = {
        "http": {"port": 9000, "max_body_bytes": 4096},
        "hardware": {"name": "a100-80gb", "has_spare": True, "upgrade": "NewCluster"},
        "models": [
            {
                "preset": "qwen2.5-7b-instruct",
                "name": "seven",
                "tensor_parallel": 1,
                "dtype": "auto",
                "engine": {"token_budget": 256},
                "replicas": {"min": 2, "max": 3, "target_open_requests": 4},
            }
        ],
        "ingress_copies": "auto",
        "log_level": "warning",
    }
    written = from_config(document)
    assert written == {
        "service": {"port": 9000},
        "maxBodyBytes": 4096,
        "hardware": {"preset": "a100-80gb", "overrides": {"has_spare": True}},
        "upgrade": {"type": "NewCluster"},
        "tensorParallel": 1,
        "replicas": {"min": 2, "max": 3, "targetOngoing": 4},
        "model": {
            "preset": "qwen2.5-7b-instruct",
            "overrides": {"name": "seven", "engine": {"token_budget": 256}},
        },
        "logLevel": "warning",
    }
    config = to_config(ChartValues.model_validate(merge(KEYS, written)))
    (model,) = config.models
    assert (model.name, model.engine.token_budget, model.replicas.min) == ("seven", 256, 2)
    assert config.http.max_body_bytes == 4096
