"""Whether a rollout is done, has failed or goes on: a state machine of snapshots and a clock.

Pure: it neither asks the API server nor sleeps (`follow` does). The one decision: a change counts
as done only when the operator has observed it and Serve has run everything for a while since,
because the first status after a change still tells the state before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from .causes import Cause, causes
from .machine import GOING_ON, Verdict
from .snapshot import DOWNLOAD, Manifest, Snapshot, containers_of, pod_group

# KubeRay looks every 2 s: its second look after a change shows what Serve made of it.
SETTLE_S = 6.0
_CREATING = "its containers are made"
_WORDS = {
    "ErrImagePull": "its image cannot be pulled",
    "ImagePullBackOff": "its image cannot be pulled, trying again",
    "CrashLoopBackOff": "ended, starts again",
}


@dataclass(frozen=True, slots=True)
class Goal:
    """What is waited for; with `former_cluster`, that another cluster has taken its place."""

    name: str
    limit_s: float | None = None
    former_cluster: str = ""
    settle_s: float = SETTLE_S


class Rollout:
    """Feed it snapshots; it answers what is new to tell, and `verdict` says how it ended."""

    def __init__(self, goal: Goal, *, now_s: float) -> None:
        self._goal = goal
        self._started_s = now_s
        self._told: dict[str, str] = {}
        self._since: dict[str, float] = {}
        self._ready_since: float | None = None
        self.verdict = GOING_ON

    def observe(self, snapshot: Snapshot, *, now_s: float) -> list[str]:
        """Lines that were not told yet, for instance "engine: pulling its image"."""
        lines = self._news(snapshot)
        found = causes(snapshot) if snapshot.service is not None else []
        self._verdict(snapshot, found, now_s)
        return lines

    def _news(self, snapshot: Snapshot) -> list[str]:
        current = describe(snapshot)
        news = [
            f"{subject}: {state}"
            for subject, state in current.items()
            if self._told.get(subject) != state
        ]
        self._told = current
        return news

    def _verdict(self, snapshot: Snapshot, found: list[Cause], now_s: float) -> None:
        self._since = {
            cause.message: self._since.get(cause.message, now_s) for cause in reversed(found)
        }
        for cause in found:
            age_s = now_s - self._since[cause.message]
            if cause.patience_s is not None and age_s >= cause.patience_s:
                self.verdict = Verdict("failed", cause.message, cause.hint)
                return
        if not is_done(snapshot, self._goal):
            self._ready_since = None
        elif self._ready_since is None:
            self._ready_since = now_s
        if self._ready_since is not None and now_s - self._ready_since >= self._goal.settle_s:
            self.verdict = Verdict("ready")
        elif self._goal.limit_s is not None and now_s - self._started_s >= self._goal.limit_s:
            self.verdict = self._out_of_time(snapshot, found)

    def _out_of_time(self, snapshot: Snapshot, found: list[Cause]) -> Verdict:
        if found:
            return Verdict("out of time", found[0].message, found[0].hint)
        if snapshot.service is None:
            return Verdict("out of time", "there is no RayService of that name")
        if not snapshot.status:
            return Verdict(
                "out of time",
                "no operator has looked at the RayService",
                "Is KubeRay running, and does it watch this namespace?",
            )
        told = "; ".join(f"{subject}: {state}" for subject, state in self._told.items())
        return Verdict("out of time", f"it was still going on ({told})")


def is_done(snapshot: Snapshot, goal: Goal) -> bool:
    """Whether everything that the newest specification wants is running."""
    statuses = snapshot.active.get("applicationStatuses") or {}
    return (
        snapshot.is_observed
        and snapshot.is_true("Ready")
        and not snapshot.pending_cluster
        and snapshot.active_cluster != goal.former_cluster
        and all(
            statuses.get(name, {}).get("status") == "RUNNING"
            for name in snapshot.wanted_applications
        )
    )


def describe(snapshot: Snapshot) -> dict[str, str]:
    """The state of every part by its name, in the order in which they come up."""
    if snapshot.service is None:
        return {"service": "waiting for it to be stored"}
    states = {"service": _of_service(snapshot)}
    for pod in snapshot.pods:
        states[_pod_title(pod, snapshot)] = _of_pod(pod, snapshot)
    for name, application in snapshot.applications.items():
        states[name] = str(application.get("status", "unknown")).lower().replace("_", " ")
    return states


def _of_service(snapshot: Snapshot) -> str:
    if snapshot.is_deleting:
        return "going"
    if snapshot.is_true("Suspended"):
        return "suspended"
    if snapshot.is_true("Suspending"):
        return "suspending"
    if not snapshot.status:
        return "waiting for the operator"
    if snapshot.is_true("UpgradeInProgress"):
        share = snapshot.pending.get("trafficRoutedPercent")
        moved = f", {share} % of the traffic moved" if share is not None else ""
        return (
            f"cluster {snapshot.pending_cluster} comes up beside {snapshot.active_cluster}{moved}"
        )
    if snapshot.is_true("Ready"):
        return f"ready on cluster {snapshot.active_cluster}"
    cluster = snapshot.pending_cluster or snapshot.active_cluster
    return f"cluster {cluster} comes up" if cluster else "waiting for a cluster"


def _pod_title(pod: Manifest, snapshot: Snapshot) -> str:
    group = pod_group(pod)
    peers = [other for other in snapshot.pods if pod_group(other) == group]
    if len(peers) == 1:
        return group
    return f"{group} {str(pod['metadata']['name']).rpartition('-')[2]}"


def _of_pod(pod: Manifest, snapshot: Snapshot) -> str:
    status = pod.get("status") or {}
    if "deletionTimestamp" in pod["metadata"]:
        return "ending"
    for container in containers_of(pod):
        state = _of_container(container, snapshot.downloads.get(pod["metadata"]["name"], ""))
        if state:
            return state if state != _CREATING else _creating(pod, snapshot)
    if not (pod.get("spec") or {}).get("nodeName"):
        return "waiting for a node"
    if not containers_of(pod):
        return f"on node {pod['spec']['nodeName']}"
    return str(status.get("phase", "unknown")).lower()


def _of_container(container: Manifest, download: str) -> str:
    """What a container is busy with before all run; empty if it is past that."""
    state, name = container.get("state") or {}, str(container.get("name", ""))
    waiting = state.get("waiting")
    if waiting is not None:
        reason = str(waiting.get("reason", ""))
        if reason in ("ContainerCreating", ""):
            return _CREATING
        return "" if reason == "PodInitializing" else f"{name}: {_WORDS.get(reason, reason)}"
    if "running" in state and name.startswith(DOWNLOAD):
        return f"weights: {download}" if download else "weights are being fetched"
    if "running" in state and name == "wait-gcs-ready":
        return "waiting for the head"
    return ""


def _creating(pod: Manifest, snapshot: Snapshot) -> str:
    """Containers say only that they are created; the kubelet's events say what is pulled."""
    name = pod["metadata"]["name"]
    pulls = [
        event
        for event in snapshot.events
        if event.get("involvedObject", {}).get("name") == name
        and event.get("reason") in ("Pulling", "Pulled")
    ]
    if pulls and pulls[-1]["reason"] == "Pulling":
        image = str(pulls[-1].get("message", "")).removeprefix("Pulling image ").strip('"')
        return f"pulls {image}"
    return _CREATING
