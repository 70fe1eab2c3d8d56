"""Which way a change takes into a running Shoal, and what that costs: told before it is done.

Pure. The one decision: the way follows from the difference of two renderings and from what KubeRay
is known to do with it, never from the wish of whoever runs the command; `recreate` alone may be
asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .changes import Changes
from .snapshot import Manifest, serve_config

Way = Literal["nothing", "in place", "new cluster", "incremental", "recreate", "suspend"]
# KubeRay keeps the cluster that it has replaced for this long (rayClusterDeletionDelaySeconds).
LINGER_S = 60
_MAX_LINES = 8


@dataclass(frozen=True, slots=True)
class Story:
    """One upgrade: its way, the lines that tell it, and why it cannot start (else empty)."""

    way: Way
    lines: tuple[str, ...] = ()
    refusal: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Situation:
    """What the running Shoal adds to the differences of two renderings.

    `parked` are changes that KubeRay has stored and not applied; `upgrading` names the cluster that
    comes up already; `num_gpus` is what one cluster holds and `spare` why a second one has no room
    (empty: it has).
    """

    parked: tuple[str, ...] = ()
    upgrading: str = ""
    is_stalled: bool = False
    is_suspended: bool = False
    num_gpus: int = 0
    spare: str = ""


def tell(changes: Changes, service: Manifest, situation: Situation, *, recreate: bool) -> Story:
    """The story of bringing `service`, the new RayService, to the running one."""
    if situation.upgrading and not recreate:
        return _already_upgrading(situation)
    if service["spec"].get("suspend"):
        return _suspend(situation)
    kind = _upgrade_type(service)
    template = (*changes.template, *situation.parked)
    if recreate or situation.is_suspended:
        return _recreate(changes, template, situation)
    if template and kind == "None":
        return Story(
            "recreate",
            (*_listed("The pods change", template),),
            refusal="the pods change, which with upgrade None KubeRay would store and not do",
            hint="Recreate them, with a break for the time of a start: --recreate."
            " Without a break it takes as many free GPUs again: upgrade.type NewCluster.",
        )
    if template:
        return _new_cluster(changes, template, situation, kind)
    if changes.is_empty:
        return Story("nothing", ("Nothing differs: nothing to do.",))
    return Story("in place", _in_place(changes, service))


def _already_upgrading(situation: Situation) -> Story:
    stalled = " and finds no room" if situation.is_stalled else ""
    return Story(
        "nothing",
        refusal=f"an upgrade is under way: cluster {situation.upgrading} comes up{stalled}",
        hint="A change now would reach that one only, and nothing but suspending everything cancels"
        " it: wait, or shoal upgrade --recreate (a break for the time of a start).",
    )


def _suspend(situation: Situation) -> Story:
    if situation.is_suspended:
        return Story("suspend", ("It stays suspended; what changes counts from its next start.",))
    return Story(
        "suspend",
        (
            "Everything is suspended: every pod ends, streams that run are cut, nobody is served.",
            "Claims, Secrets and the address stay. Start it again: --set suspend=false",
        ),
    )


def _recreate(changes: Changes, template: tuple[str, ...], situation: Situation) -> Story:
    lines = [*_listed("The pods change", template)]
    if changes.is_empty and not template:
        lines.append("Nothing differs; every pod is made anew.")
    if situation.is_suspended:
        lines.append("It is suspended already: everything starts with the new values.")
    else:
        lines += [
            "Recreate: everything is suspended, then started with the new values.",
            "From the moment the pods end until the new ones are ready nobody is served: the time"
            " of a start (pods, weights from the claim, warm-up), minutes for a large model.",
            "Streams that run are cut. Claims, Secrets and the address stay.",
        ]
    return Story("recreate", tuple(lines))


def _new_cluster(
    changes: Changes, template: tuple[str, ...], situation: Situation, kind: str
) -> Story:
    is_incremental = kind == "NewClusterWithIncrementalUpgrade"
    gpus = situation.num_gpus
    held = f"{2 * gpus} GPUs in the place of {gpus}" if gpus else "twice the CPUs and memory"
    lines = [
        *_listed("The pods change", template),
        "A second cluster comes up beside this one, then the traffic moves"
        f" {'step by step' if is_incremental else 'at once'}; nobody waits.",
        f"Until then, and {LINGER_S} s longer, it holds {held}.",
    ]
    if changes.restarted or changes.adjusted:
        lines.append("The changed configuration comes with the new cluster.")
    if situation.spare:
        return Story(
            "incremental" if is_incremental else "new cluster",
            tuple(lines),
            refusal=f"a second cluster has no room: {situation.spare}",
            hint="It would wait for ever, and only suspending everything ends that. Recreate with a"
            " break: --recreate (or --ignore-capacity, if nodes are added when pods wait).",
        )
    return Story("incremental" if is_incremental else "new cluster", tuple(lines))


def _in_place(changes: Changes, service: Manifest) -> tuple[str, ...]:
    lines = []
    if changes.restarted:
        names = ", ".join(changes.restarted)
        lines.append(f"In place: Serve replaces the copies of {names}; every pod stays.")
        lines.append(_gap(changes.restarted, service))
    if changes.adjusted:
        lines.append(f"In place, without a restart: {', '.join(changes.adjusted)}.")
    if changes.groups:
        lines.append(
            f"Bounds and tolerations of group {', '.join(changes.groups)} are written to the"
            " running cluster, which KubeRay does not do; tolerations count for new pods."
        )
    lines += _listed("Changed beside it", changes.others)
    return tuple(lines)


def _gap(restarted: tuple[str, ...], service: Manifest) -> str:
    config = serve_config(service)
    without_surge = [
        str(entry["name"])
        for entry in config.get("applications", [])
        if entry["name"] in restarted
        and any(
            deployment.get("max_surge_percent") == 0 for deployment in entry.get("deployments", [])
        )
    ]
    if not without_surge:
        return "Each new copy starts before an old one ends; nobody waits."
    return (
        f"There is no room for a second copy of {', '.join(without_surge)}: the old one ends first,"
        " and with one copy its requests wait until the new one is loaded."
    )


def _upgrade_type(service: Manifest) -> str:
    return str((service["spec"].get("upgradeStrategy") or {}).get("type", "NewCluster"))


def _listed(title: str, entries: tuple[str, ...]) -> list[str]:
    if not entries:
        return []
    shown = [f"  {entry}" for entry in entries[:_MAX_LINES]]
    left = len(entries) - len(shown)
    return [f"{title}:", *shown, *([f"  and {left} more"] if left else [])]
