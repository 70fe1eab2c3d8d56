"""Every rendered object against the schemas of Kubernetes and the CRDs, unknown fields refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from scripts.control_plane import ToolMissingError, find_crds
from tests.chart.cases import CASES, FEATURES, Case
from tests.chart.crd_schema import validators
from tests.chart.pod_security import container_violations, violations
from tests.chart.rendering import find, pod_specs, render

KUBERNETES = "1.36.0"
CUSTOM = ("ray.io/", "monitoring.coreos.com/", "gateway.networking.k8s.io/")


@pytest.fixture(scope="session")
def crds() -> Path:
    try:
        return find_crds()
    except ToolMissingError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_custom_objects_have_no_field_that_a_server_would_drop(case: Case, crds: Path) -> None:
    custom = [item for item in render(case.values) if item["apiVersion"].startswith(CUSTOM)]
    assert custom
    for item in custom:
        validator = validators(crds)[item["apiVersion"], item["kind"]]
        problems = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(item)]
        assert problems == []


@cache
def _validate(text: str) -> None:
    kubernetes_validate.validate(json.loads(text), KUBERNETES, strict=True)


def test_core_objects_and_pod_templates_pass_kubernetes_own_schema() -> None:
    """Each different object once: most of the matrix differs in the RayService alone."""
    num_seen = 0
    for case in CASES:
        pods = [
            {"apiVersion": "v1", "kind": "Pod", **pod} for pod in pod_specs(case.values).values()
        ]
        core = [item for item in render(case.values) if not item["apiVersion"].startswith(CUSTOM)]
        for item in [*core, *pods]:
            _validate(json.dumps(_comparable(item), sort_keys=True))
            num_seen += 1
    assert num_seen > 4 * len(CASES)


def _comparable(item: dict[str, Any]) -> dict[str, Any]:
    """`item` without the figures that make it one of many alike."""
    text = json.dumps(item)
    for model in ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b"):
        text = text.replace(model, "7b").replace(model.upper(), "7B")
    copy: dict[str, Any] = json.loads(text)
    return copy


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pods_are_restricted(case: Case) -> None:
    found = {name: list(violations(pod["spec"])) for name, pod in pod_specs(case.values).items()}
    assert {name: problems for name, problems in found.items() if problems} == {}


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_autoscaler_beside_the_head_is_restricted(case: Case) -> None:
    cluster = find(case.values, "RayService")["spec"]["rayClusterConfig"]
    pod = cluster["headGroupSpec"]["template"]["spec"]["securityContext"]
    sidecars = [cluster[key] for key in ("autoscalerOptions",) if key in cluster]
    assert len(sidecars) == cluster["enableInTreeAutoscaling"]
    assert [
        rule
        for each in sidecars
        for rule in container_violations({**pod, **each["securityContext"]})
    ] == []


def test_checker_of_restricted_pods_finds_each_breach() -> None:
    spec = {
        "hostNetwork": True,
        "volumes": [{"name": "host", "hostPath": {"path": "/"}}],
        "containers": [{"name": "a", "ports": [{"hostPort": 1}]}],
    }
    assert list(violations(spec)) == [
        "hostNetwork",
        "volume host: ['hostPath']",
        "a: allowPrivilegeEscalation",
        "a: capabilities.drop",
        "a: runAsNonRoot",
        "a: seccompProfile",
        "a: hostPort",
    ]


def test_strict_schema_finds_a_misspelt_field(crds: Path) -> None:
    service = json.loads(json.dumps(find(FEATURES[0].values, "RayService")))
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containerz"] = []
    validator = validators(crds)["ray.io/v1", "RayService"]
    (error,) = validator.iter_errors(service)
    assert "containerz" in error.message
