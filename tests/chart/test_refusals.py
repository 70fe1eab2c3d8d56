"""Values that cannot work are refused by the name of the key, by Helm and by `to_config` alike."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from cluster.helm_values import ChartValues, to_config
from cluster.helm_values.resolved import merge
from serve.errors import ConfigurationError
from tests.chart.cases import SMALL, served
from tests.chart.rendering import helm_python, render

SEVEN = served("qwen2.5-7b-instruct", "rtx4090d-x4")
FOURTEEN = served("qwen2.5-14b-instruct", "rtx4090d-x4")
TWO = [{"preset": "demo", "tensorParallel": 2}, {"preset": "demo", "tensorParallel": 1}]
BIG = "qwen2.5-1.5b-instruct"
TWINS = [
    {"preset": "demo", "overrides": {"name": "a.b"}},
    {"preset": "demo", "overrides": {"name": "a-b"}},
]
BOTH: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (SMALL, {"model": {"preset": "qwen3"}}, "preset"),
    (SMALL, {"model": {"preset": ""}}, "preset"),
    (SMALL, {"hardware": {"preset": "h100"}}, "preset"),
    (SMALL, {"tensorParalel": 2}, "tensorParalel"),
    (SMALL, {"model": {"overrides": {"max_modl_len": 1}}}, "max_modl_len"),
    (SMALL, {"model": {"overrides": {"dtype": "auto"}}}, "dtype"),
    (SMALL, {"model": {"overrides": {"path": "/x"}}}, "path"),
    (SMALL, {"model": {"overrides": {"tensor_parallel": 1}}}, "tensor_parallel"),
    (SMALL, {"model": {"overrides": {"engine": {"block_sise": 1}}}}, "block_sise"),
    (SMALL, {"model": {"overrides": {"name": "../etc"}}}, "model.overrides.name: must be letters"),
    (SMALL, {"hardware": {"overrides": {"device": "cuda"}}}, "device"),
    (SMALL, {"hardware": {"overrides": {"pod": {"gpu": "1"}}}}, "gpu"),
    (SMALL, {"replicas": {"min": 3, "max": 2}}, "replicas.max"),
    (SMALL, {"upgrade": {"type": "Recreate"}}, "type"),
    (SMALL, {"image": {"digest": "sha256:1"}}, "digest"),
    (SMALL, {"podLabels": {"app.kubernetes.io/name": "x"}}, "app.kubernetes.io"),
    (
        SMALL,
        {"auth": {"apiKeys": {"existingSecret": ""}}},
        "auth.apiKeys.existingSecret: is needed",
    ),
    (SMALL, {"auth": {"allowAnonymous": True}}, "auth.allowAnonymous: must be false"),
    (FOURTEEN, {"tensorParallel": 1}, "tensorParallel: 1 cannot be used for qwen2.5-14b-instruct"),
    (SEVEN, {"tensorParallel": 3}, "sizes that fit: "),
    (SEVEN, {"tensorParallel": 8}, "tensorParallel: 8 cannot be used"),
    (
        served("qwen2.5-72b-instruct", "cpu"),
        {},
        "model.preset: qwen2.5-72b-instruct on cpu: 72.7 billion",
    ),
    (SMALL, {"models": TWO}, "models[1].tensorParallel: must be 2"),
    (SMALL, {"models": [{"preset": "demo"}, {}]}, "preset"),
    (SMALL, {"models": [{"preset": "demo"}, {"preset": BIG}]}, "models[1].preset: needs pods of"),
]
HELM_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"weights": {"pvc": {"accessMode": "ReadOnlyMany"}}}, "accessMode"),
    ({"ingressCopies": 5}, "ingressCopies: must be <= 4 (4 for each engine pod), got 5"),
    (
        {"models": [{"preset": "demo", "replicas": {"min": 3, "max": 2}}]},
        "models[0].replicas.max: must be >= replicas.min (3), got 2",
    ),
    ({"models": TWINS}, "models[1].overrides.name: another model"),
    ({"fullnameOverride": "a" * 48}, "fullnameOverride: a name must have at most 47"),
    ({"fullnameOverride": "9lives"}, "fullnameOverride: a name must be lower-case"),
    ({"fullnameOverride": "a.b"}, "fullnameOverride: a name must be lower-case"),
    ({"weights": {"from": "image"}}, "weights.ociImage: is needed"),
    ({"weights": {"pvc": {"readOnly": True}}}, "weights.pvc.readOnly: "),
    ({"model": {"preset": "demo"}, "weights": {"from": "pvc"}}, "weights.from: shoal-demo has no"),
    ({"upgrade": {"type": "Incremental"}}, "upgrade.incremental.gatewayClassName: is needed"),
    (
        {
            "upgrade": {
                "type": "Incremental",
                "incremental": {
                    "gatewayClassName": "istio",
                    "stepPercent": 50,
                    "maxSurgePercent": 25,
                },
            }
        },
        "upgrade.incremental.stepPercent: must be <= maxSurgePercent (25), got 50",
    ),
    (
        {
            "upgrade": {"type": "Incremental", "incremental": {"gatewayClassName": "istio"}},
            "autoscaler": {"enabled": False},
        },
        "autoscaler.enabled: must be true",
    ),
    (
        {
            "upgrade": {"type": "Incremental", "incremental": {"gatewayClassName": "istio"}},
            "expose": {"type": "ingress"},
        },
        "expose.type: must be none",
    ),
    ({"expose": {"type": "httproute"}}, "expose.httproute.gateway.name: is needed"),
    ({"expose": {"type": "ingress", "ingress": {"tlsSecret": "t"}}}, "expose.host: is needed"),
    ({"head": {"gcsFaultTolerance": {"enabled": True}}}, "redisAddress: is needed"),
]


@pytest.mark.parametrize(("base", "change", "message"), BOTH, ids=lambda part: str(part)[:50])
def test_helm_and_python_refuse_alike(
    base: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    values = merge(base, change)
    with pytest.raises(helm_python.HelmError) as by_helm:
        render(values)
    assert message in str(by_helm.value)
    with pytest.raises((ConfigurationError, ValidationError)) as by_python:
        to_config(ChartValues.model_validate(values))
    assert message in str(by_python.value)


@pytest.mark.parametrize(("change", "message"), HELM_ONLY, ids=lambda part: str(part)[:50])
def test_helm_refuses_with_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(helm_python.HelmError) as caught:
        render(merge(SMALL, change))
    assert message in str(caught.value)


def test_long_release_name_is_refused() -> None:
    from tests.chart.rendering import CHART, load_chart

    with pytest.raises(helm_python.HelmError, match="at most 47"):
        load_chart(CHART).render(SMALL, name="a" * 50, namespace="n")
