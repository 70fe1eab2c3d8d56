"""One look at a RayService and everything below it, as the API server tells it.

Not live and not a judgement: `causes` and `rollout` read it, `follow` takes it. The one decision:
pods are found by the name that KubeRay gives a RayService's clusters, because after a suspension
they outlive both the cluster object and every status that named it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

Manifest = dict[str, Any]
RAY_NODES = "ray.io/is-ray-node=yes"
# How the names of the chart's init containers that fetch weights begin.
DOWNLOAD = "download-"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`service` is None before and after its life; `downloads` maps pods to a line of their log."""

    service: Manifest | None
    clusters: tuple[Manifest, ...] = ()
    pods: tuple[Manifest, ...] = ()
    events: tuple[Manifest, ...] = ()
    downloads: Mapping[str, str] = field(default_factory=dict)

    @property
    def status(self) -> Manifest:
        """The RayService's status; empty until the operator has written one."""
        return dict((self.service or {}).get("status") or {})

    @property
    def is_observed(self) -> bool:
        """Whether the operator has seen the newest specification."""
        wanted = (self.service or {}).get("metadata", {}).get("generation", 0)
        return int(self.status.get("observedGeneration", 0)) >= int(wanted)

    @property
    def is_deleting(self) -> bool:
        """Whether the RayService waits for its finalizer."""
        return "deletionTimestamp" in (self.service or {}).get("metadata", {})

    @property
    def active(self) -> Manifest:
        """What the status says of the cluster that serves; empty where none does."""
        return dict(self.status.get("activeServiceStatus") or {})

    @property
    def pending(self) -> Manifest:
        """What the status says of the cluster that is being made; empty where none is."""
        return dict(self.status.get("pendingServiceStatus") or {})

    @property
    def active_cluster(self) -> str:
        return str(self.active.get("rayClusterName", ""))

    @property
    def pending_cluster(self) -> str:
        return str(self.pending.get("rayClusterName", ""))

    @property
    def applications(self) -> dict[str, Manifest]:
        """Statuses of Serve's applications: of the cluster being made, else of the one serving."""
        for part in (self.pending, self.active):
            if part.get("applicationStatuses"):
                return dict(part["applicationStatuses"])
        return {}

    @property
    def wanted_applications(self) -> list[str]:
        """Names of the applications in `serveConfigV2`."""
        applications = serve_config(self.service or {}).get("applications", [])
        return [str(entry.get("name")) for entry in applications]

    def condition(self, kind: str) -> Manifest:
        """A condition of the RayService; empty where there is none."""
        for found in self.status.get("conditions") or []:
            if found.get("type") == kind:
                return dict(found)
        return {}

    def is_true(self, kind: str) -> bool:
        """Whether a condition holds."""
        return self.condition(kind).get("status") == "True"


def serve_config(service: Manifest) -> Manifest:
    """The parsed `serveConfigV2` of a RayService; empty where there is none."""
    text = (service.get("spec") or {}).get("serveConfigV2") or "{}"
    return yaml.load(text, Loader=yaml.CSafeLoader) or {}


def is_pod_of(pod: Manifest, service_name: str) -> bool:
    """Whether a pod belongs to a cluster of this RayService: `<name>-` and five characters."""
    cluster = str(pod["metadata"].get("labels", {}).get("ray.io/cluster", ""))
    return re.fullmatch(re.escape(service_name) + "-[a-z0-9]{5}", cluster) is not None


def pod_group(pod: Manifest) -> str:
    """`head`, or the worker group's name."""
    labels = pod["metadata"].get("labels", {})
    if labels.get("ray.io/node-type") == "head":
        return "head"
    return str(labels.get("ray.io/group", "worker"))


def containers_of(pod: Manifest) -> list[Manifest]:
    """Statuses of every container, the ones that run first come first."""
    status = pod.get("status") or {}
    return [
        *(status.get("initContainerStatuses") or []),
        *(status.get("containerStatuses") or []),
    ]
