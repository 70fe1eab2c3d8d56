"""The server takes every object that the chart renders, and every pod that a release leads to.

Strictly: a field unknown to the server is an error. The namespace enforces restricted pod security.
Nothing is stored (dry runs), so every switch of the chart and every model on every machine is
tried. The operator is not there to make the pods: `scripts.control_plane.kuberay` makes them, with
what KubeRay injects.
"""

from __future__ import annotations

from typing import Any

import pytest

from scripts.control_plane import Api, ApiServer, RefusedError
from scripts.control_plane.kuberay import cluster_name, head_pod, worker_pods
from tests.chart.cases import FEATURES, MATRIX, Case
from tests.chart.rendering import NAMESPACE, render

pytestmark = pytest.mark.apiserver

# What no pod depends on is in the chart's own tests.
PLACES = [case for case in MATRIX if "-None-" in case.name]
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


@pytest.fixture(scope="module")
def api(api_server: ApiServer) -> Api:
    """The server with what the cases refer to."""
    api_server.create_namespace(NAMESPACE)
    for kind, name, more in (
        ("PriorityClass", "high", {"apiVersion": "scheduling.k8s.io/v1", "value": 1}),
        ("RuntimeClass", "gvisor", {"apiVersion": "node.k8s.io/v1", "handler": "runsc"}),
    ):
        api_server.api.create({"kind": kind, "metadata": {"name": name}, **more})
    return api_server.api


def ray_service(case: Case, api: Api) -> dict[str, Any]:
    """The case's RayService as the server would store it, with the account that KubeRay makes."""
    (service,) = [item for item in render(case.values) if item["kind"] == "RayService"]
    account = {"name": cluster_name(service), "namespace": NAMESPACE}
    api.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account})
    return api.create(service, dry_run=True)


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_server_takes_every_object(case: Case, api: Api) -> None:
    stored = [
        api.create({**item, "metadata": {"namespace": NAMESPACE, **item["metadata"]}}, dry_run=True)
        for item in render(case.values)
    ]

    assert "RayService" in {item["kind"] for item in stored}
    assert {item["metadata"]["namespace"] for item in stored} == {NAMESPACE}


@pytest.mark.parametrize("case", [*PLACES, *FEATURES], ids=str)
def test_pods_that_kuberay_makes_are_admitted(case: Case, api: Api) -> None:
    service = ray_service(case, api)
    pods = [head_pod(service), *worker_pods(service)]

    head, engine = (api.create(pod, dry_run=True) for pod in pods)

    names = [container["name"] for container in head["spec"]["containers"]]
    is_scaled = service["spec"]["rayClusterConfig"]["enableInTreeAutoscaling"]
    assert names == (["head", "autoscaler"] if is_scaled else ["head"])
    assert engine["spec"]["initContainers"][0]["name"] == "wait-gcs-ready"
    assert mounts(engine["spec"]["containers"][0]).count("/dev/shm") == 1
    # The engine, its downloads and what KubeRay injects hold no token of the cluster.
    everywhere = [*engine["spec"]["initContainers"], *engine["spec"]["containers"]]
    assert all(ACCOUNT not in mounts(container) for container in everywhere)


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_head_service_of_kuberay_finds_the_head(case: Case, api: Api) -> None:
    labels = head_pod(ray_service(case, api))["metadata"]["labels"]

    assert labels["app.kubernetes.io/name"] == "kuberay"
    assert labels["app.kubernetes.io/created-by"] == "kuberay-operator"


def test_autoscaler_without_a_security_context_of_its_own_would_be_refused(api: Api) -> None:
    service = ray_service(PLACES[0], api)
    del service["spec"]["rayClusterConfig"]["autoscalerOptions"]["securityContext"]

    with pytest.raises(RefusedError, match='container "autoscaler" must set'):
        api.create(head_pod(service), dry_run=True)


def mounts(container: dict[str, Any]) -> list[str]:
    return [mount["mountPath"] for mount in container.get("volumeMounts", [])]
