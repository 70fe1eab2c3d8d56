"""Looks at a cluster again and again and feeds a state machine: a thin shell.

Nothing is decided here, and nothing is changed in the cluster. A look is a handful of lists; a
failed one is forgiven for a while, because a rollout outlives a laptop's network.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.errors import ClusterError, ForbiddenError
from cluster.kube import EVENT, POD, RAY_CLUSTER, RAY_SERVICE, Kube

from .machine import Machine, Verdict
from .snapshot import DOWNLOAD, RAY_NODES, Manifest, Snapshot, is_pod_of

POLL_S = 1.0
_FORGIVEN_S = 60.0
Wait = Callable[[float], bool]
Tell = Callable[[float, str], None]


class Watcher:
    """Takes snapshots of one RayService; events from before the watcher are left out."""

    def __init__(self, kube: Kube, name: str, *, has_past: bool = False) -> None:
        self._kube = kube
        self._name = name
        self._past: frozenset[tuple[str, str]] = frozenset()
        if not has_past:
            self._past = frozenset(_identity(event) for event in self._kube.select(EVENT))

    def look(self) -> Snapshot:
        """One look."""
        service = self._kube.get(RAY_SERVICE, self._name)
        label = f"ray.io/originated-from-cr-name={self._name}"
        clusters = tuple(self._kube.select(RAY_CLUSTER, labels=label))
        pods = self.pods()
        known = {
            found["metadata"]["uid"]
            for found in (*([service] if service else []), *clusters, *pods)
        }
        events = tuple(
            event
            for event in self._kube.select(EVENT)
            if event.get("involvedObject", {}).get("uid") in known
            and _identity(event) not in self._past
        )
        downloads = {
            pod["metadata"]["name"]: self._kube.last_line(pod["metadata"]["name"], container)
            for pod in pods
            if (container := _downloading(pod))
        }
        return Snapshot(service, clusters, pods, events, downloads)

    def pods(self) -> tuple[Manifest, ...]:
        """The pods of all its clusters, the ones that end included."""
        found = self._kube.select(POD, labels=RAY_NODES)
        return tuple(pod for pod in found if is_pod_of(pod, self._name))


def follow(watcher: Watcher, machine: Machine, *, wait: Wait, tell: Tell) -> Verdict | None:
    """Watch until there is a verdict; None if the user wants to stop.

    `wait` sleeps for that many seconds and says whether to stop; `tell` shows a line, with the
    seconds since the start.

    Raises:
        ClusterError: a right is missing, or the API has not answered for a minute.
    """
    started_s = time.monotonic()
    answered_s = started_s
    while True:
        now_s = time.monotonic()
        try:
            snapshot = watcher.look()
        except ForbiddenError:
            raise
        except ClusterError:
            if now_s - answered_s > _FORGIVEN_S:
                raise
        else:
            answered_s = now_s
            for line in machine.observe(snapshot, now_s=now_s):
                tell(now_s - started_s, line)
            if machine.verdict.state != "going on":
                return machine.verdict
        if wait(POLL_S):
            return None


def _identity(event: Manifest) -> tuple[str, str]:
    return event["metadata"]["uid"], event["metadata"]["resourceVersion"]


def _downloading(pod: Manifest) -> str:
    """Name of the init container that fetches weights right now; empty: none does."""
    for container in (pod.get("status") or {}).get("initContainerStatuses") or []:
        name = str(container.get("name", ""))
        if name.startswith(DOWNLOAD) and "running" in (container.get("state") or {}):
            return name
    return ""
