"""Kubernetes' Pod Security Standard "restricted", as far as a pod can break it.

Not admission itself: a real API server with its own check is in tests/kubernetes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_VOLUMES = frozenset(
    {
        *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image"),
        *("persistentVolumeClaim", "projected", "secret"),
    }
)
_HOST = ("hostNetwork", "hostPID", "hostIPC")


def violations(spec: dict[str, Any]) -> Iterator[str]:
    """Every rule of "restricted" that a pod's `spec` breaks, a line each."""
    yield from (key for key in _HOST if spec.get(key))
    for volume in spec.get("volumes", []):
        kinds = set(volume) - {"name"}
        if len(kinds) != 1 or not kinds <= _VOLUMES:
            yield f"volume {volume['name']}: {sorted(kinds)}"
    pod = spec.get("securityContext", {})
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        context = {**pod, **container.get("securityContext", {})}
        yield from (f"{container['name']}: {rule}" for rule in container_violations(context))
        for port in container.get("ports", []):
            if "hostPort" in port:
                yield f"{container['name']}: hostPort"


def container_violations(context: dict[str, Any]) -> Iterator[str]:
    """Rules that a container's securityContext, the pod's below it, breaks."""
    if context.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation"
    if context.get("capabilities", {}).get("drop") != ["ALL"]:
        yield "capabilities.drop"
    if context.get("capabilities", {}).get("add"):
        yield "capabilities.add"
    if context.get("runAsNonRoot") is not True or context.get("runAsUser") == 0:
        yield "runAsNonRoot"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "seccompProfile"
    if context.get("privileged"):
        yield "privileged"
