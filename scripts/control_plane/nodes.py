"""kube-scheduler and fake nodes: whether a pod of the chart would find a place, and which.

The scheduler is the real one. kwok says of every pod on a node that it runs, because no kubelet
does; nothing is ever pulled or started.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .api import NotFoundError, Object
from .server import ApiServer
from .tools import find_tool

_STAGES = Path(__file__).with_name("stages.yaml")
_GPU_TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
_PLACED_S = 100.0
# The scheduler hears of nodes and volumes in its own time: what it refuses it may place a moment
# later, after a pause of a second.
_REFUSED_S = 5.0
_POLL_S = 0.1


class Nodes:
    """A scheduler over nodes that `add` makes; it works in every namespace until `close`.

    Raises:
        ToolMissingError: from the constructor, before anything is started.
    """

    def __init__(self, server: ApiServer) -> None:
        scheduler, kwok = find_tool("kube-scheduler"), find_tool("kwok")
        self._api = server.api
        kubeconfig = f"--kubeconfig={server.kubeconfig}"
        self._programs = [
            server.start([scheduler, kubeconfig, "--leader-elect=false", "--secure-port=0"]),
            server.start(
                [
                    kwok,
                    kubeconfig,
                    f"--config={_STAGES}",
                    "--manage-all-nodes=true",
                    "--node-lease-duration-seconds=0",
                ]
            ),
        ]

    def add(
        self,
        name: str,
        *,
        gpus: int = 0,
        product: str = "",
        cpu: str = "32",
        memory: str = "256Gi",
    ) -> str:
        """A Ready node; one with GPUs is labelled and tainted as NVIDIA's operator does."""
        labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}
        room = {"cpu": cpu, "memory": memory, "pods": "110"}
        if gpus:
            labels["nvidia.com/gpu.product"] = product
            room["nvidia.com/gpu"] = str(gpus)
        node: Object = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": labels},
        }
        self._api.create(node)
        status = {"capacity": room, "allocatable": room}
        self._api.merge(node, {"status": status}, subresource="status")
        # Admission taints every new node as not ready, and a controller would take that back.
        self._api.merge(node, {"spec": {"taints": [_GPU_TAINT] if gpus else None}})
        return name

    def add_examples(self) -> None:
        """One node for each hardware preset."""
        self.add("box-4090d", gpus=4, product="NVIDIA-GeForce-RTX-4090-D")
        self.add("a100", gpus=1, product="NVIDIA-A100-SXM4-80GB")
        self.add("cpu")

    def remove(self, name: str) -> None:
        self._api.delete({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})

    def clear(self) -> None:
        """Removes every node and every pod, placed or waiting, of all namespaces."""
        for kind in ("Pod", "Node"):
            for item in self._api.list("v1", kind):
                with contextlib.suppress(NotFoundError):  # kwok was quicker
                    self._api.delete(item)

    def close(self) -> None:
        """Ends both programs; what they did stays."""
        for program in self._programs:
            program.end()

    def bind_claim(self, claim: Mapping[str, Any]) -> None:
        """Gives a claim a volume, which is a controller's work in a cluster."""
        metadata, spec = claim["metadata"], claim["spec"]
        name = f"{metadata['namespace']}-{metadata['name']}"
        reference = {"kind": "PersistentVolumeClaim", "apiVersion": "v1", "uid": metadata["uid"]}
        self._api.create(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": name},
                "spec": {
                    "capacity": spec["resources"]["requests"],
                    "accessModes": spec["accessModes"],
                    "claimRef": {
                        **reference,
                        "name": metadata["name"],
                        "namespace": metadata["namespace"],
                    },
                    "hostPath": {"path": f"/nowhere/{name}"},
                },
            }
        )
        bound = {"metadata": {"annotations": {"pv.kubernetes.io/bind-completed": "yes"}}}
        self._api.merge(claim, {**bound, "spec": {"volumeName": name}})
        self._api.merge(claim, {"status": {"phase": "Bound"}}, subresource="status")

    def wait_for(self, pod: Mapping[str, Any]) -> Object:
        """`pod` once the scheduler has placed it and kwok calls it running, or goes on refusing it.

        Raises:
            TimeoutError: neither happened.
        """
        metadata = pod["metadata"]
        deadline = time.monotonic() + _PLACED_S
        refused_s = 0.0
        while time.monotonic() < deadline:
            found = self._api.get("v1", "Pod", metadata["name"], metadata["namespace"])
            if found["status"]["phase"] == "Running" or refused_s > _REFUSED_S:
                return found
            time.sleep(_POLL_S)
            refused_s = refused_s + _POLL_S if refusal(found) else 0.0
        raise TimeoutError(f"pod {metadata['name']} neither placed nor refused in {_PLACED_S} s")


def refusal(pod: Mapping[str, Any]) -> str:
    """Why the scheduler did not place `pod`; "" where it did."""
    conditions: Sequence[Mapping[str, Any]] = pod["status"].get("conditions", [])
    for condition in conditions:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return str(condition["message"])
    return ""
