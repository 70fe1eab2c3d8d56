"""The real scheduler on fake nodes: presets fit the machines that they are named after.

Pods are made of the stored RayService (`scripts.control_plane.kuberay`): there is no operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from scripts.control_plane import Api, ApiServer, Nodes, RefusedError, refusal
from scripts.control_plane.kuberay import head_pod, worker_pods

pytestmark = [pytest.mark.apiserver, pytest.mark.helm]

KEYS = {"auth": {"apiKeys": {"existingSecret": "chat-keys"}}}
BOX: dict[str, Any] = {"hardware": {"preset": "rtx4090d-x4"}, **KEYS}
A100: dict[str, Any] = {"hardware": {"preset": "a100-80gb"}, **KEYS}
CPU: dict[str, Any] = {"model": {"preset": "demo"}, "hardware": {"preset": "cpu"}, **KEYS}


@pytest.fixture
def nodes(scheduler: Nodes) -> Iterator[Nodes]:
    """A box of four 4090D, two A100 machines and two without a GPU."""
    scheduler.add("box", gpus=4, product="NVIDIA-GeForce-RTX-4090-D")
    for name in ("a100-1", "a100-2"):
        scheduler.add(name, gpus=1, product="NVIDIA-A100-SXM4-80GB")
    for name in ("cpu-1", "cpu-2"):
        scheduler.add(name)
    yield scheduler
    scheduler.clear()


@dataclass(frozen=True)
class Engines:
    """Engine pods of one release, placed by the scheduler or refused by it."""

    nodes: Nodes
    helm: Any
    api: Api

    def place(self, values: dict[str, Any], num_pods: int = 1) -> list[dict[str, Any]]:
        service = self.install(values)
        pods = (worker_pods(service)[0] for _ in range(num_pods))
        return [self.start(pod) for pod in pods]

    def install(self, values: dict[str, Any]) -> dict[str, Any]:
        """The RayService, once its claims have volumes."""
        self.helm.install(values)
        for claim in self.api.list("v1", "PersistentVolumeClaim", self.helm.namespace):
            self.nodes.bind_claim(claim)
        return self.api.get("ray.io/v1", "RayService", "chat", self.helm.namespace)

    def start(self, pod: dict[str, Any]) -> dict[str, Any]:
        return self.nodes.wait_for(self.api.create(pod))


@pytest.fixture
def engines(nodes: Nodes, helm: Any, api_server: ApiServer) -> Engines:
    return Engines(nodes, helm, api_server.api)


def node_of(pod: dict[str, Any]) -> str:
    assert pod["status"]["phase"] == "Running", refusal(pod)
    return str(pod["spec"]["nodeName"])


def test_copy_over_four_gpus_takes_the_box(engines: Engines) -> None:
    (pod,) = engines.place(BOX)

    assert node_of(pod) == "box"


def test_second_copy_waits_and_says_which_resource_it_lacks(engines: Engines) -> None:
    first, second = engines.place(BOX, 2)

    assert node_of(first) == "box"
    assert second["status"]["phase"] == "Pending"
    assert "Insufficient nvidia.com/gpu" in refusal(second)


def test_copies_on_one_gpu_spread_over_machines(engines: Engines) -> None:
    selected = {"pod": {"node_selector": {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}}}
    hardware = {"preset": "a100-80gb", "overrides": selected}

    pods = engines.place({**A100, "hardware": hardware}, 2)

    assert {node_of(pod) for pod in pods} == {"a100-1", "a100-2"}


def test_copies_without_gpus_spread_over_machines_of_any_size(engines: Engines) -> None:
    engines.nodes.remove("cpu-2")
    engines.nodes.add("cpu-large", cpu="256", memory="2Ti")

    pods = engines.place(CPU, 2)

    assert {node_of(pod) for pod in pods} == {"cpu-1", "cpu-large"}


def test_gpu_nodes_are_closed_to_pods_that_tolerate_nothing(engines: Engines) -> None:
    for name in ("cpu-1", "cpu-2"):
        engines.nodes.remove(name)
    (pod,) = engines.place(CPU)

    assert "untolerated taint" in refusal(pod)


def test_a_drain_may_take_the_head_and_not_the_last_engine(engines: Engines) -> None:
    service = engines.install({**CPU, "autoscaler": {"enabled": False}})
    head, engine = (engines.start(pod) for pod in (head_pod(service), worker_pods(service)[0]))
    namespace = engines.helm.namespace
    (budget,) = engines.api.list("policy/v1", "PodDisruptionBudget", namespace)
    # A controller counts the pods in a cluster: one of the one that must stay is there.
    counted = {"expectedPods": 1, "currentHealthy": 1, "desiredHealthy": 1, "disruptionsAllowed": 0}
    observed = {"observedGeneration": budget["metadata"]["generation"], **counted}
    engines.api.merge(budget, {"status": observed}, subresource="status")

    engines.api.evict(head)
    with pytest.raises(RefusedError, match="would violate the pod's disruption budget"):
        engines.api.evict(engine)

    # Ray's object has no scale, which a share of the pods would be a share of.
    assert budget["spec"]["minAvailable"] == 1


def test_helm_test_is_admitted_and_placed_beside_a_release(engines: Engines) -> None:
    engines.install(A100)

    report = engines.helm("test", "chat")

    assert "Phase:          Succeeded" in report
    assert engines.api.list("v1", "Pod", engines.helm.namespace) == []
