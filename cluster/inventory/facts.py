"""What a cluster has of what a rendering needs: asked for, never judged (`preflight`).

What the user may not see is None, never "absent": the preflight then says that it could not look.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import ForbiddenError
from cluster.kube import (
    CLAIM,
    DEFINITION,
    DEPLOYMENT,
    NAMESPACE,
    NODE,
    POD,
    PRIORITY_CLASS,
    RUNTIME_CLASS,
    SECRET,
    STORAGE_CLASS,
    Kube,
)
from cluster.permissions import Permission

from .capacity import Node
from .needs import Needs
from .quantity import parse_quantity

Manifest = dict[str, Any]
_NUM_QUESTIONS_AT_ONCE = 8
_DONE_PHASES = ("Succeeded", "Failed")


@dataclass(frozen=True, slots=True)
class Operator:
    """A Deployment of KubeRay's operator."""

    namespace: str
    name: str
    image: str
    is_available: bool


@dataclass(frozen=True, slots=True)
class Facts:
    """The answers; None where the user has no right to ask."""

    version: tuple[int, int]
    namespace: Manifest | None
    has_namespace: bool
    served: frozenset[tuple[str, str]]  # (group, plural) of the kinds that are needed and there
    stored: Mapping[str, str] | None  # definition -> its storage version
    has_old_definition: bool  # RayService's is known, and older than KubeRay 1.7's
    operators: tuple[Operator, ...] | None
    nodes: tuple[Node, ...] | None
    storage_classes: Mapping[str, bool] | None  # name -> whether it is the default
    priority_classes: frozenset[str] | None
    runtime_classes: frozenset[str] | None
    secrets: Mapping[str, Mapping[str, str] | None] = field(default_factory=dict)
    unseen_secrets: frozenset[str] = frozenset()
    claims: Mapping[str, Manifest | None] = field(default_factory=dict)
    denied: tuple[Permission, ...] = ()
    unseen: tuple[Permission, ...] = ()


def gather(kube: Kube, needs: Needs) -> Facts:
    """Ask the cluster everything that `needs` makes worth asking.

    Raises:
        ClusterError: it does not answer.
    """
    asker = _Asker(kube)
    space = asker.ask(
        lambda: kube.get(NAMESPACE, kube.namespace), Permission("get", "", "namespaces")
    )
    definitions = _definitions(asker, needs)
    secrets = {
        name: asker.ask(
            lambda name=name: kube.get(SECRET, name),  # type: ignore[misc]
            Permission("get", "", "secrets", kube.namespace),
        )
        for name in dict.fromkeys(secret.name for secret in needs.secrets)
    }
    return Facts(
        version=kube.version(),
        namespace=space.value,
        has_namespace=space.value is not None or not space.was_seen,
        served=_served(kube, needs),
        stored=None
        if definitions is None
        else {name: str(version["name"]) for name, version in definitions.items()},
        has_old_definition=_is_old(definitions),
        operators=_operators(asker),
        nodes=_nodes(asker),
        storage_classes=_storage_classes(asker) if needs.storage_classes else {},
        priority_classes=_names(asker, PRIORITY_CLASS) if needs.priority_classes else frozenset(),
        runtime_classes=_names(asker, RUNTIME_CLASS) if needs.runtime_classes else frozenset(),
        secrets={name: _decoded(answer.value) for name, answer in secrets.items()},
        unseen_secrets=frozenset(name for name, found in secrets.items() if not found.was_seen),
        claims={name: kube.get(CLAIM, name) for name in needs.claims},
        denied=_denied(kube, needs),
        unseen=tuple(dict.fromkeys(asker.unseen)),
    )


@dataclass(frozen=True, slots=True)
class _Seen:
    value: Any
    was_seen: bool


class _Asker:
    """Asks, and notes what it has no right to."""

    def __init__(self, kube: Kube) -> None:
        self.kube = kube
        self.unseen: list[Permission] = []

    def ask(self, question: Callable[[], Any], right: Permission) -> _Seen:
        try:
            return _Seen(question(), was_seen=True)
        except ForbiddenError:
            self.unseen.append(right)
            return _Seen(None, was_seen=False)

    def every(self, kind: Any, namespace: str = "") -> list[Manifest] | None:
        right = Permission("list", kind.group, kind.plural, namespace)
        found = self.ask(lambda: self.kube.select(kind, namespace=namespace), right)
        return found.value if found.was_seen else None


def _served(kube: Kube, needs: Needs) -> frozenset[tuple[str, str]]:
    versions = dict.fromkeys((api.group, api.version) for api in needs.apis)
    return frozenset(
        (group, plural) for group, version in versions for plural in kube.resources(group, version)
    )


def _definitions(asker: _Asker, needs: Needs) -> dict[str, Manifest] | None:
    """The stored version of each definition of KubeRay's that is needed."""
    stored: dict[str, Manifest] = {}
    for api in needs.apis:
        if api.group != "ray.io":
            continue
        name = f"{api.plural}.{api.group}"
        right = Permission("get", DEFINITION.group, DEFINITION.plural)
        seen = asker.ask(lambda name=name: asker.kube.get(DEFINITION, name), right)  # type: ignore[misc]
        if not seen.was_seen:
            return None
        for version in (seen.value or {}).get("spec", {}).get("versions", []):
            if version.get("storage"):
                stored[name] = version
    return stored


def _is_old(definitions: dict[str, Manifest] | None) -> bool:
    version = (definitions or {}).get("rayservices.ray.io")
    if version is None:
        return False
    schema = version.get("schema", {}).get("openAPIV3Schema", {}).get("properties", {})
    return "suspend" not in schema.get("spec", {}).get("properties", {})


def _operators(asker: _Asker) -> tuple[Operator, ...] | None:
    found = asker.every(DEPLOYMENT)
    if found is None:
        return None
    return tuple(
        Operator(
            namespace=entry["metadata"]["namespace"],
            name=entry["metadata"]["name"],
            image=container["image"],
            is_available=bool((entry.get("status") or {}).get("availableReplicas")),
        )
        for entry in found
        for container in entry["spec"]["template"]["spec"]["containers"][:1]
        if entry["metadata"].get("labels", {}).get("app.kubernetes.io/name") == "kuberay-operator"
        or "kuberay/operator" in container["image"]
    )


def _nodes(asker: _Asker) -> tuple[Node, ...] | None:
    nodes, pods = asker.every(NODE), asker.every(POD)
    if nodes is None or pods is None:
        return None
    used: dict[str, dict[str, float]] = {}
    for pod in pods:
        name = pod["spec"].get("nodeName")
        if name and (pod.get("status") or {}).get("phase") not in _DONE_PHASES:
            total = used.setdefault(name, {"pods": 0.0})
            total["pods"] += 1
            for container in pod["spec"]["containers"]:
                requests = (container.get("resources") or {}).get("requests") or {}
                for resource, amount in requests.items():
                    total[resource] = total.get(resource, 0.0) + parse_quantity(amount)
    return tuple(_node(entry, used.get(entry["metadata"]["name"], {})) for entry in nodes)


def _node(entry: Manifest, used: dict[str, float]) -> Node:
    status = entry.get("status") or {}
    is_ready = any(
        condition["type"] == "Ready" and condition["status"] == "True"
        for condition in status.get("conditions") or []
    )
    return Node(
        name=entry["metadata"]["name"],
        free={
            resource: parse_quantity(amount) - used.get(resource, 0.0)
            for resource, amount in (status.get("allocatable") or {}).items()
        },
        labels=dict(entry["metadata"].get("labels") or {}),
        taints=tuple(entry["spec"].get("taints") or ()),
        is_ready=is_ready and not entry["spec"].get("unschedulable"),
    )


def _storage_classes(asker: _Asker) -> dict[str, bool] | None:
    found = asker.every(STORAGE_CLASS)
    if found is None:
        return None
    default = "storageclass.kubernetes.io/is-default-class"
    return {
        entry["metadata"]["name"]: (entry["metadata"].get("annotations") or {}).get(default)
        == "true"
        for entry in found
    }


def _names(asker: _Asker, kind: Any) -> frozenset[str] | None:
    found = asker.every(kind)
    return None if found is None else frozenset(entry["metadata"]["name"] for entry in found)


def _denied(kube: Kube, needs: Needs) -> tuple[Permission, ...]:
    with ThreadPoolExecutor(_NUM_QUESTIONS_AT_ONCE) as pool:
        answers = list(pool.map(kube.is_allowed, needs.permissions))
    pairs = zip(needs.permissions, answers, strict=True)
    return tuple(permission for permission, is_allowed in pairs if not is_allowed)


def _decoded(secret: Manifest | None) -> dict[str, str] | None:
    if secret is None:
        return None
    return {
        key: base64.b64decode(value).decode(errors="replace")
        for key, value in (secret.get("data") or {}).items()
    }
