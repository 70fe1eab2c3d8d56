"""What the templates make of presets, against the Python twin and against Ray's own schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cluster.helm_values import ChartValues, to_config
from cluster.manifests import serve_applications
from tests.chart.cases import CASES, YARN_OFF, Case
from tests.chart.rendering import serve_config


@pytest.mark.parametrize("case", CASES, ids=str)
def test_serve_config_is_what_the_command_line_makes(case: Case) -> None:
    config = to_config(ChartValues.model_validate(case.values))
    assert serve_config(case) == serve_applications(config)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_serve_config_passes_rays_own_schema(case: Case) -> None:
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import ServeDeploySchema

    config = serve_config(case)
    ServeDeploySchema.model_validate(config)
    for scaling in _autoscaling(config):
        AutoscalingConfig.model_validate(scaling)
    assert _unknown_keys(config, ServeDeploySchema) == []


def _autoscaling(config: dict[str, Any]) -> Iterator[Any]:
    for application in config["applications"]:
        for deployment in application["deployments"]:
            if "autoscaling_config" in deployment:
                yield deployment["autoscaling_config"]


def _unknown_keys(config: dict[str, Any], schema: Any) -> list[str]:
    """Keys that Ray would ignore: its schema lets unknown ones pass."""
    from ray.serve.schema import DeploymentSchema, ServeApplicationSchema

    unknown = [key for key in config if key not in schema.model_fields]
    for application in config["applications"]:
        unknown += [key for key in application if key not in ServeApplicationSchema.model_fields]
        for deployment in application["deployments"]:
            unknown += [key for key in deployment if key not in DeploymentSchema.model_fields]
    return unknown


def test_an_override_wins_also_where_it_is_false() -> None:
    """Helm's merge takes an empty value for an absent one where it is used naively."""
    (model, _) = serve_config(YARN_OFF)["applications"]
    assert model["args"]["model"]["yarn"] is False
    assert model["args"]["model"]["max_model_len"] == 32768
