"""What differs between two renderings of the chart, in KubeRay's terms.

Pure. Not what it costs (`story`). The one decision: what KubeRay leaves out of the hash that
decides about a new cluster is left out here too, and looked at on its own, because nothing but
Shoal carries it to a running cluster.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .snapshot import Manifest, serve_config

# Ray Serve replaces the copies of a deployment for these; everything else changes in place.
_RESTARTING_APPLICATION = ("import_path", "runtime_env", "args")
_RESTARTING_DEPLOYMENT = (
    "ray_actor_options",
    "placement_group_bundles",
    "placement_group_strategy",
    "max_replicas_per_node",
)
_BOUNDS = ("minReplicas", "maxReplicas")


@dataclass(frozen=True, slots=True)
class Changes:
    """All differences; every tuple is empty where there is none."""

    restarted: tuple[str, ...] = ()  # applications whose copies are replaced
    adjusted: tuple[str, ...] = ()  # applications that change in place, come or go
    template: tuple[str, ...] = ()  # `path: old -> new` in what makes a new cluster
    groups: tuple[str, ...] = ()  # worker groups whose bounds or tolerations differ
    others: tuple[str, ...] = ()  # objects beside the RayService, as `Service shoal`

    @property
    def is_empty(self) -> bool:
        return not (self.restarted or self.adjusted or self.template or self.groups or self.others)


def compare(old: list[Manifest], new: list[Manifest]) -> Changes:
    """The differences between the objects of two renderings."""
    before, after = ray_service(old), ray_service(new)
    old_config, new_config = serve_config(before), serve_config(after)
    restarted, adjusted = _compare_applications(old_config, new_config)
    template = [*template_differences(_cluster(before), _cluster(after))]
    if old_config.get("http_options") != new_config.get("http_options"):
        template.append("serveConfigV2.http_options: is fixed while Serve runs")
    return Changes(
        restarted=restarted,
        adjusted=adjusted,
        template=tuple(template),
        groups=tuple(_changed_groups(_cluster(before), _cluster(after))),
        others=tuple(_other_objects(old, new)),
    )


def ray_service(objects: list[Manifest]) -> Manifest:
    """The RayService of a rendering."""
    return next(found for found in objects if found.get("kind") == "RayService")


def template_differences(before: Manifest, after: Manifest) -> list[str]:
    """Lines `path: old -> new` for what makes KubeRay want a new cluster.

    Worker groups that are added at the end do not: KubeRay adds them to the running cluster.
    """
    old, new = _hashed(before), _hashed(after)
    old_groups, new_groups = old.get("workerGroupSpecs", []), new.get("workerGroupSpecs", [])
    if len(new_groups) > len(old_groups):
        new["workerGroupSpecs"] = new_groups[: len(old_groups)]
    return list(_differences(old, new, ""))


def group_patches(live: Manifest, wanted: Manifest) -> list[Manifest]:
    """JSON patch operations that bring bounds and tolerations of `wanted` to a running cluster.

    Both are specifications of a RayCluster. Each operation is guarded by the name of its group.
    """
    groups = {group["groupName"]: group for group in wanted.get("workerGroupSpecs", [])}
    operations: list[Manifest] = []
    for index, group in enumerate(live.get("workerGroupSpecs", [])):
        goal = groups.get(group["groupName"])
        found = _group_operations(f"/spec/workerGroupSpecs/{index}", group, goal) if goal else []
        if found:
            guard = f"/spec/workerGroupSpecs/{index}/groupName"
            operations += [{"op": "test", "path": guard, "value": group["groupName"]}, *found]
    return operations


def _group_operations(path: str, group: Manifest, goal: Manifest) -> list[Manifest]:
    operations = [
        {"op": "add", "path": f"{path}/{bound}", "value": goal[bound]}
        for bound in _BOUNDS
        if bound in goal and goal[bound] != group.get(bound)
    ]
    if "minReplicas" in goal and group.get("replicas", 0) < goal["minReplicas"]:
        operations.append({"op": "add", "path": f"{path}/replicas", "value": goal["minReplicas"]})
    wanted = _pod_spec(goal).get("tolerations") or []
    if wanted != (_pod_spec(group).get("tolerations") or []):
        operations.append(
            {"op": "add", "path": f"{path}/template/spec/tolerations", "value": wanted}
        )
    return operations


def _compare_applications(old: Manifest, new: Manifest) -> tuple[tuple[str, ...], tuple[str, ...]]:
    before = {entry["name"]: entry for entry in old.get("applications", [])}
    after = {entry["name"]: entry for entry in new.get("applications", [])}
    restarted, adjusted = [], []
    for name in [*after, *(name for name in before if name not in after)]:
        if before.get(name) == after.get(name):
            continue
        if name in before and name in after and _restarts(before[name], after[name]):
            restarted.append(name)
        else:
            adjusted.append(name)
    return tuple(restarted), tuple(adjusted)


def _restarts(old: Manifest, new: Manifest) -> bool:
    if any(old.get(key) != new.get(key) for key in _RESTARTING_APPLICATION):
        return True
    before = {entry["name"]: entry for entry in old.get("deployments", [])}
    return any(
        before.get(entry["name"], {}).get(key) != entry.get(key)
        for entry in new.get("deployments", [])
        for key in _RESTARTING_DEPLOYMENT
    )


def _changed_groups(before: Manifest, after: Manifest) -> Iterator[str]:
    old = {group["groupName"]: group for group in before.get("workerGroupSpecs", [])}
    for group in after.get("workerGroupSpecs", []):
        former = old.get(group["groupName"])
        if former is None or _group_operations("", former, group):
            yield str(group["groupName"])


def _other_objects(old: list[Manifest], new: list[Manifest]) -> Iterator[str]:
    before, after = _by_identity(old), _by_identity(new)
    for identity in dict.fromkeys([*before, *after]):
        if before.get(identity) != after.get(identity):
            yield " ".join(identity)


def _by_identity(objects: list[Manifest]) -> dict[tuple[str, str], Manifest]:
    """Objects but the RayService, without what every new version of the chart changes."""
    found = {}
    for entry in objects:
        if entry.get("kind") == "RayService":
            continue
        entry = copy.deepcopy(entry)
        labels = entry["metadata"].get("labels") or {}
        labels.pop("helm.sh/chart", None)
        labels.pop("app.kubernetes.io/version", None)
        found[(str(entry["kind"]), str(entry["metadata"]["name"]))] = entry
    return found


def _cluster(service: Manifest) -> Manifest:
    return dict(service["spec"].get("rayClusterConfig") or {})


def _pod_spec(group: Manifest) -> Manifest:
    return dict((group.get("template") or {}).get("spec") or {})


def _hashed(cluster: Manifest) -> Manifest:
    """What KubeRay hashes: no bounds, tolerations, scheduling gates, strategy or suspension."""
    kept = copy.deepcopy(cluster)
    kept.pop("upgradeStrategy", None)
    kept.pop("suspend", None)
    groups = kept.get("workerGroupSpecs") or []
    for group in groups:
        for key in ("replicas", *_BOUNDS):
            group.pop(key, None)
        (group.get("scaleStrategy") or {}).pop("workersToDelete", None)
        if not group.get("scaleStrategy"):
            group.pop("scaleStrategy", None)
    for group in [kept.get("headGroupSpec") or {}, *groups]:
        spec = (group.get("template") or {}).get("spec") or {}
        spec.pop("tolerations", None)
        spec.pop("schedulingGates", None)
    return kept


def _differences(old: Any, new: Any, path: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            inner = f"{path}.{key}" if path else str(key)
            yield from _differences(old.get(key), new.get(key), inner)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            named = after.get("name") if isinstance(after, dict) else None
            yield from _differences(before, after, f"{path}[{named or index}]")
    elif old != new:
        yield f"{path}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = str(value).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."
