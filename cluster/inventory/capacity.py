"""Whether pods find room on nodes, and if not, why each node takes none.

Pure. Not a scheduler: selectors, taints and free resources only, pods placed one after the other.
What it refuses no scheduler can place; what it lets through may still wait for something else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .needs import PodNeed
from .quantity import render_amount

Manifest = dict[str, Any]
_MAX_NODES_NAMED = 6


@dataclass(slots=True)
class Node:
    """What a node is and has left; `free` in cores, bytes and pieces."""

    name: str
    free: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)
    taints: tuple[Manifest, ...] = ()
    is_ready: bool = True

    def refuses(self, need: PodNeed) -> str:
        """Why it takes no pod of `need`; empty if it takes one."""
        if not self.is_ready:
            return "not ready, or cordoned"
        for label, value in need.node_selector.items():
            if self.labels.get(label) != value:
                return f"lacks label {label}={value}"
        for taint in self.taints:
            if taint.get("effect") != "PreferNoSchedule" and not _tolerates(need, taint):
                return f"has taint {taint['key']}={taint.get('value', '')}:{taint['effect']}"
        for resource, amount in need.resources.items():
            free = self.free.get(resource, 0.0)
            if free < amount:
                return f"{render_amount(resource, max(free, 0.0))} free"
        return ""

    def take(self, need: PodNeed) -> None:
        """Place one pod."""
        for resource, amount in need.resources.items():
            self.free[resource] = self.free.get(resource, 0.0) - amount


def shortages(needs: Iterable[PodNeed], nodes: Iterable[Node]) -> list[str]:
    """One line for each group that finds no room for all of its pods; empty if all fit.

    Pods that need most are placed first, each on the fullest node that takes it.
    """
    left = [Node(n.name, dict(n.free), n.labels, n.taints, n.is_ready) for n in nodes]
    lines = []
    for need in sorted(needs, key=lambda need: need.num_gpus, reverse=True):
        num_placed = 0
        for _ in range(need.count):
            chosen = min(
                (node for node in left if not node.refuses(need)),
                key=lambda node: (
                    node.free.get("nvidia.com/gpu", 0.0),
                    node.free.get("cpu", 0.0),
                ),
                default=None,
            )
            if chosen is None:
                break
            chosen.take(need)
            num_placed += 1
        if num_placed < need.count:
            lines.append(_shortage(need, num_placed, left))
    return lines


def _shortage(need: PodNeed, num_placed: int, nodes: list[Node]) -> str:
    wanted = ", ".join(render_amount(*resource) for resource in sorted(need.resources.items()))
    pods = f"{need.count} {need.group} pod{'s' if need.count > 1 else ''}"
    room = (
        f"room for {num_placed} of {pods} of {wanted}"
        if num_placed
        else f"no room for {pods} of {wanted}"
    )
    named = [f"{node.name}: {node.refuses(need)}" for node in nodes[:_MAX_NODES_NAMED]]
    if len(nodes) > len(named):
        named.append(f"and {len(nodes) - len(named)} more nodes")
    return f"{room} ({'; '.join(named) or 'there is no node'})"


def _tolerates(need: PodNeed, taint: Manifest) -> bool:
    return any(
        toleration.get("effect") in (None, "", taint.get("effect"))
        and (
            (not toleration.get("key") and toleration.get("operator") == "Exists")
            or (
                toleration.get("key") == taint["key"]
                and (
                    toleration.get("operator", "Equal") == "Exists"
                    or toleration.get("value", "") == taint.get("value", "")
                )
            )
        )
        for toleration in need.tolerations
    )
