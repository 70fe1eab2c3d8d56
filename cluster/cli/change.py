"""What `shoal upgrade` and `shoal rollback` share: the story of a change, told and then done.

Not the story itself (`cluster.rollout.story`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.helm import HelmEngine
    from cluster.kube import Kube
    from cluster.rollout.machine import Verdict
    from cluster.rollout.release import Following
    from cluster.rollout.snapshot import Snapshot
    from cluster.rollout.story import Story

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Choices:
    """How the user wants it; `has_capacity`: nodes come when pods wait."""

    is_recreation: bool
    is_dry_run: bool
    is_sure: bool
    is_followed: bool
    has_capacity: bool
    limit_s: float


@dataclass(frozen=True, slots=True)
class Step:
    """One change: what applies it, what suspends everything before, and the RayService after."""

    apply: Callable[[], object]
    suspended: Values
    service: Values


@dataclass(frozen=True, slots=True)
class Session:
    """A release that is there, and where."""

    name: str
    kube: Kube
    helm: HelmEngine
    console: Console

    def change(
        self,
        old: list[Values],
        new: list[Values],
        *,
        apply: Callable[[], object],
        written: Values,
        suspended: Values,
        choices: Choices,
    ) -> None:
        """Tell the story from `old` to `new`, ask, and do it.

        Raises:
            ClusterError: it cannot be done that way, or it failed.
            KeyboardInterrupt: the user does not want it.
        """
        from cluster.rollout.addresses import addresses_of
        from cluster.rollout.changes import compare, ray_service
        from cluster.rollout.follow import Watcher
        from cluster.rollout.story import tell

        from . import rollout_console as say

        service = ray_service(new)
        looked = say.look(self.kube, new)
        snapshot = Watcher(self.kube, service["metadata"]["name"], has_past=True).look()
        situation = self._situation(snapshot, looked, choices)
        story = tell(compare(old, new), service, situation, recreate=choices.is_recreation)
        self._print(story)
        if story.way == "nothing":
            return
        say.preflight(self.console, self.kube, looked, written, has_capacity=True)
        if choices.is_dry_run:
            self.console.print("Nothing was changed.")
            return
        say.confirm(question="Go on?", is_sure=choices.is_sure)
        with say.following(self.console, limit_s=choices.limit_s) as following:
            step = Step(apply, suspended, service)
            verdict = self._do(story, step, snapshot, following, choices)
        if not choices.is_followed:
            self.console.print("Applied; the cluster goes on.")
            return
        say.end(verdict, self.kube, self.name)
        if story.way != "suspend":
            where = {"context": self.kube.context, "namespace": self.kube.namespace}
            say.print_ready(self.console, self.kube, self.name, addresses_of(new, **where))

    def _situation(self, snapshot: Snapshot, looked: Any, choices: Choices) -> Any:
        from cluster.inventory import shortages
        from cluster.rollout.situation import situation_of

        facts, needs = looked
        short: list[str] = []
        if facts.nodes is not None and not choices.has_capacity:
            short = shortages(needs.pods, facts.nodes)
        num_gpus = sum(pod.count * pod.num_gpus for pod in needs.pods)
        return situation_of(snapshot, num_gpus=num_gpus, spare="; ".join(short))

    def _print(self, story: Story) -> None:
        from cluster.errors import ClusterError

        for line in story.lines:
            self.console.print(line)
        if story.refusal:
            raise ClusterError(story.refusal, hint=story.hint)

    def _do(
        self,
        story: Story,
        step: Step,
        snapshot: Snapshot,
        following: Following,
        choices: Choices,
    ) -> Verdict | None:
        from cluster.rollout.release import Release

        name = step.service["metadata"]["name"]
        release = Release(self.kube, self.helm, name=self.name, service=name)
        followed = following if choices.is_followed else None
        if story.way == "suspend":
            step.apply()
            return release.suspended(following) if followed else None
        if story.way == "recreate":
            is_suspended = snapshot.is_true("Suspended") and not snapshot.pods
            return release.recreate(
                None if is_suspended else step.suspended,
                step.apply,
                following,
                is_followed=choices.is_followed,
            )
        former = "" if story.way == "in place" else snapshot.active_cluster
        return release.change(step.apply, step.service, followed, former_cluster=former)


def open_session(name: str, *, context: str | None, namespace: str | None) -> Session:
    """The release of that name.

    Raises:
        NotRunningError: there is none.
    """
    from cluster.errors import NotRunningError
    from cluster.helm import open_helm
    from cluster.kube import connect

    from .rollout_console import make_console

    kube = connect(context=context, namespace=namespace)
    helm = open_helm(context=kube.context, namespace=kube.namespace)
    if not helm.history(name):
        raise NotRunningError(
            f"no release named {name!r} in {kube.context}, namespace {kube.namespace}",
            hint="Install one with `shoal deploy`, or name another one with --name, --namespace.",
        )
    return Session(name, kube, helm, make_console())
