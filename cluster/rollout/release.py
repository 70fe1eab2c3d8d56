"""The steps that bring a rendering to a cluster: thin, each one a call to Helm and a wait.

What to do was decided before (`story`), how it goes is judged elsewhere (`rollout`, `machine`).
The one decision: a recreation suspends through the chart's own value, in a revision of its own, so
that Helm never finds a field of its objects changed by somebody else; `previous_revision` steps
over such revisions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.errors import ClusterError, CommandError, InterruptedStartError
from cluster.helm import HelmEngine, Revision
from cluster.kube import RAY_CLUSTER, Kube

from .follow import Tell, Wait, Watcher, follow
from .machine import Ending, Verdict
from .rollout import SETTLE_S, Goal, Rollout
from .situation import live_patches
from .snapshot import Manifest

Values = dict[str, Any]
_RESUMABLE = ("superseded", "deployed")


@dataclass(frozen=True, slots=True)
class Following:
    """How to wait and whom to tell, and for how long at most."""

    wait: Wait
    tell: Tell
    limit_s: float | None


class Release:
    """One release of the chart; `name` is Helm's, `service` the RayService's."""

    def __init__(self, kube: Kube, helm: HelmEngine, *, name: str, service: str) -> None:
        self._kube = kube
        self._helm = helm
        self._name = name
        self._service = service

    def install(self, values: Values, following: Following | None) -> Verdict | None:
        """Install and follow; without `following`, only install."""
        watcher = Watcher(self._kube, self._service)
        self._helm.deploy(values, name=self._name, is_upgrade=False, is_dry_run=False)
        return self._follow(watcher, Goal(self._service), following)

    def change(
        self,
        apply: Callable[[], object],
        service: Manifest,
        following: Following | None,
        *,
        former_cluster: str = "",
    ) -> Verdict | None:
        """Apply in place or beside the running cluster (`former_cluster`), and follow.

        Bounds and tolerations of `service` go to the running cluster too: KubeRay leaves them.
        """
        watcher = Watcher(self._kube, self._service)
        apply()
        if not former_cluster:
            for cluster, operations in live_patches(watcher.look(), service):
                self._kube.patch(RAY_CLUSTER, cluster, operations)
        goal = Goal(self._service, former_cluster=former_cluster)
        return self._follow(watcher, goal, following)

    def recreate(
        self,
        suspended: Values | None,
        apply: Callable[[], object],
        following: Following,
        *,
        is_followed: bool,
    ) -> Verdict | None:
        """Suspend with the values `suspended` (None: it is), wait for the pods' end, apply.

        Raises:
            ClusterError: the pods did not end: it stays suspended.
            InterruptedStartError: the user stopped waiting: so does it.
        """
        if suspended is not None:
            self._helm.deploy(suspended, name=self._name, is_upgrade=True, is_dry_run=False)
            ended = self.suspended(following)
            if ended is None or ended.state != "ready":
                raise _left_suspended(ended)
        watcher = Watcher(self._kube, self._service)
        apply()
        return self._follow(watcher, Goal(self._service), following if is_followed else None)

    def suspended(self, following: Following) -> Verdict | None:
        """Wait until the suspended release has no pods."""
        ending = Ending(
            self._service, is_removal=False, now_s=time.monotonic(), limit_s=following.limit_s
        )
        watcher = Watcher(self._kube, self._service)
        return follow(watcher, ending, wait=following.wait, tell=following.tell)

    def remove(self, following: Following | None) -> Verdict | None:
        """Uninstall and wait until the operator has let the RayService and its pods go."""
        watcher = Watcher(self._kube, self._service)
        self._helm.uninstall(self._name)
        if following is None:
            return None
        ending = Ending(
            self._service, is_removal=True, now_s=time.monotonic(), limit_s=following.limit_s
        )
        return follow(watcher, ending, wait=following.wait, tell=following.tell)

    def _follow(self, watcher: Watcher, goal: Goal, following: Following | None) -> Verdict | None:
        return None if following is None else _follow(watcher, goal, following)


def watch(kube: Kube, name: str, following: Following) -> Verdict | None:
    """Follow a RayService from wherever it is until all of it runs."""
    return _follow(Watcher(kube, name, has_past=True), Goal(name), following)


def _follow(watcher: Watcher, goal: Goal, following: Following) -> Verdict | None:
    limited = Goal(goal.name, following.limit_s, goal.former_cluster, SETTLE_S)
    machine = Rollout(limited, now_s=time.monotonic())
    return follow(watcher, machine, wait=following.wait, tell=following.tell)


def previous_revision(helm: HelmEngine, name: str, history: list[Revision]) -> int | None:
    """The newest revision before the current one that ran: not one that only suspended."""
    resumable = (found for found in reversed(history[:-1]) if found.status in _RESUMABLE)
    return next(
        (
            revision.number
            for revision in resumable
            if not helm.release(name, revision.number).values.get("suspend")
        ),
        None,
    )


def _left_suspended(ended: Verdict | None) -> CommandError:
    again = "Go on with the same command, or start the old state: shoal rollback"
    if ended is None:
        return InterruptedStartError("it stays suspended, nobody is served", hint=again)
    message = f"it stays suspended, nobody is served: {ended.message}"
    return ClusterError(message, hint=f"{ended.hint}\n{again}".strip())
