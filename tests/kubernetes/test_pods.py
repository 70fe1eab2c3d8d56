"""Every pod that a release leads to is admitted where pod security is restricted.

The operator is not there to make them: `scripts.control_plane.kuberay` makes them of the stored
RayService, with what KubeRay injects.
"""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from scripts.control_plane import Api, ApiServer, RefusedError
from scripts.control_plane.kuberay import cluster_name, head_pod, worker_pods

pytestmark = [pytest.mark.apiserver, pytest.mark.helm]

KEYS = {"apiKeys": {"existingSecret": "chat-keys"}}
CASES: dict[str, dict[str, Any]] = {
    "box of 4090D": {"hardware": {"preset": "rtx4090d-x4"}, "auth": KEYS},
    "A100": {
        "hardware": {"preset": "a100-80gb"},
        "auth": {**KEYS, "hfToken": {"existingSecret": "hf"}},
    },
    "demo on processors": {
        "model": {"preset": "demo"},
        "hardware": {"preset": "cpu"},
        "auth": {"allowAnonymous": True},
    },
    "weights from an image": {
        "hardware": {"preset": "a100-80gb"},
        "weights": {"from": "image", "ociImage": "example.org/weights:1"},
        "auth": KEYS,
    },
    "weights for each pod": {"weights": {"from": "ephemeral"}, "auth": KEYS},
    "fixed number of pods": {"autoscaler": {"enabled": False}, "auth": KEYS},
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def service(request: pytest.FixtureRequest, helm: Any, api_server: ApiServer) -> dict[str, Any]:
    """The RayService of one case, as the server stored it."""
    helm.install(request.param)
    return api_server.api.get("ray.io/v1", "RayService", "chat", helm.namespace)


def test_pods_that_kuberay_makes_are_admitted(
    service: dict[str, Any], api_server: ApiServer, helm: Any
) -> None:
    api = api_server.api
    # KubeRay makes the autoscaler's account.
    create_account(api, cluster_name(service), helm.namespace)

    head, engine = (api.create(pod) for pod in (head_pod(service), *worker_pods(service)))

    names = [container["name"] for container in head["spec"]["containers"]]
    is_scaled = service["spec"]["rayClusterConfig"]["enableInTreeAutoscaling"]
    assert names == ["head", "autoscaler"] if is_scaled else ["head"]
    assert engine["spec"]["initContainers"][0]["name"] == "wait-gcs-ready"
    assert [mount for mount in mounts(engine) if mount == "/dev/shm"] == ["/dev/shm"]


def test_engine_pods_hold_no_token_of_the_cluster(
    service: dict[str, Any], api_server: ApiServer
) -> None:
    (engine,) = (api_server.api.create(pod) for pod in worker_pods(service))

    everywhere = [*engine["spec"]["initContainers"], *engine["spec"]["containers"]]
    paths = {mount["mountPath"] for container in everywhere for mount in container["volumeMounts"]}
    assert "/var/run/secrets/kubernetes.io/serviceaccount" not in paths


def test_head_service_of_kuberay_finds_the_head(service: dict[str, Any]) -> None:
    labels = head_pod(service)["metadata"]["labels"]

    assert labels["app.kubernetes.io/name"] == "kuberay"
    assert labels["app.kubernetes.io/created-by"] == "kuberay-operator"


def test_autoscaler_without_a_security_context_of_its_own_would_be_refused(
    helm: Any, api_server: ApiServer
) -> None:
    api = api_server.api
    helm.install(CASES["A100"])
    service = api.get("ray.io/v1", "RayService", "chat", helm.namespace)
    create_account(api, cluster_name(service), helm.namespace)
    del service["spec"]["rayClusterConfig"]["autoscalerOptions"]["securityContext"]

    with pytest.raises(RefusedError, match='container "autoscaler" must set'):
        api.create(head_pod(service))


def test_pods_of_helm_test_are_admitted(helm: Any, api_server: ApiServer) -> None:
    helm.install(CASES["A100"])

    hooks = [hook for hook in yaml.safe_load_all(helm("get", "hooks", "chat")) if hook]

    pods = [hook for hook in hooks if hook["kind"] == "Pod"]
    assert pods
    for pod in pods:
        metadata = {**pod["metadata"], "namespace": helm.namespace}
        assert api_server.api.create({**pod, "metadata": metadata})["metadata"]["uid"]


def create_account(api: Api, name: str, namespace: str) -> None:
    metadata = {"name": name, "namespace": namespace}
    api.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})


def mounts(pod: dict[str, Any]) -> list[str]:
    return [mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"]]
