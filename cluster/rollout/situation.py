"""What the running Shoal adds to the difference of two renderings: read from a snapshot.

Pure. A change that KubeRay has stored and parked shows nowhere in its status; it shows in the
difference between the RayService and the RayCluster that was made from it.
"""

from __future__ import annotations

from .changes import group_patches, template_differences
from .snapshot import Manifest, Snapshot
from .story import Situation


def situation_of(snapshot: Snapshot, *, num_gpus: int, spare: str) -> Situation:
    """The situation; `num_gpus` of one cluster, `spare` why a second one has no room."""
    live = cluster_named(snapshot, snapshot.active_cluster)
    stored = (snapshot.service or {}).get("spec", {}).get("rayClusterConfig") or {}
    is_upgrading = snapshot.is_true("UpgradeInProgress")
    return Situation(
        parked=tuple(template_differences(live["spec"], stored)) if live is not None else (),
        upgrading=snapshot.pending_cluster if is_upgrading else "",
        is_stalled=is_upgrading and is_waiting_for_room(snapshot, snapshot.pending_cluster),
        is_suspended=snapshot.is_true("Suspended"),
        num_gpus=num_gpus,
        spare=spare,
    )


def is_waiting_for_room(snapshot: Snapshot, cluster: str) -> bool:
    """Whether a pod of `cluster` finds no node."""
    return any(
        condition.get("type") == "PodScheduled" and condition.get("status") == "False"
        for pod in snapshot.pods
        if pod["metadata"]["labels"].get("ray.io/cluster") == cluster
        for condition in (pod.get("status") or {}).get("conditions") or []
    )


def cluster_named(snapshot: Snapshot, name: str) -> Manifest | None:
    """The RayCluster of that name, if it is there."""
    return next(
        (found for found in snapshot.clusters if found["metadata"]["name"] == name and name), None
    )


def live_patches(snapshot: Snapshot, service: Manifest) -> list[tuple[str, list[Manifest]]]:
    """For each running RayCluster, what brings `service`'s bounds and tolerations to it."""
    wanted = service["spec"]["rayClusterConfig"]
    return [
        (found["metadata"]["name"], operations)
        for found in snapshot.clusters
        if "deletionTimestamp" not in found["metadata"]
        and (operations := group_patches(found["spec"], wanted))
    ]
