"""Why a rendering cannot run on a cluster: every reason at once, before anything is made.

Pure: facts and needs in, problems out. The one decision: a problem names the key of the values (or
the object) and the next step; what could not be looked at is a warning, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster.permissions import missing_rules
from serve.errors import ConfigurationError
from serve.keys import parse_keys

from .capacity import shortages
from .facts import Facts
from .needs import Needs, SecretNeed

OLDEST_KUBERAY = (1, 7)
IMAGE_VOLUMES = (1, 35)
_VERSION = re.compile(r":v?(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason; `is_capacity` ones may be waived, warnings stop nothing."""

    key: str
    message: str
    hint: str = ""
    is_warning: bool = False
    is_capacity: bool = False

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


def check(facts: Facts, needs: Needs, values: dict[str, Any], *, namespace: str) -> list[Problem]:
    """Every problem, refusals first. `values` are the user's, to name the keys in messages."""
    found = [
        *_rights(facts),
        *_namespace(facts, namespace),
        *_kinds(facts, needs),
        *_operator(facts, values),
        *_secrets(facts, needs, values, namespace),
        *_storage(facts, needs, values, namespace),
        *_classes(facts, needs),
        *_capacity(facts, needs),
        *_unseen(facts),
    ]
    return sorted(found, key=lambda problem: problem.is_warning)


def _rights(facts: Facts) -> Iterator[Problem]:
    if facts.denied:
        verbs: dict[str, dict[str, None]] = {}
        for right in facts.denied:
            verbs.setdefault(right.kind, {})[right.verb] = None
        lacking = "; ".join(f"{'/'.join(wanted)} {kind}" for kind, wanted in verbs.items())
        yield Problem(
            "permissions",
            f"you may not {lacking}",
            f"Ask an administrator for:\n{missing_rules(list(facts.denied))}",
        )


def _namespace(facts: Facts, namespace: str) -> Iterator[Problem]:
    if not facts.has_namespace:
        yield Problem(
            "--namespace",
            f"there is no namespace {namespace!r}",
            f"Make it: kubectl create namespace {namespace}",
        )


def _kinds(facts: Facts, needs: Needs) -> Iterator[Problem]:
    hints = {
        "ray.io": ("KubeRay", "Install KubeRay 1.7: helm install kuberay-operator"),
        "monitoring.coreos.com": (
            "monitoring",
            "Install the prometheus-operator, or set monitoring.podMonitor and .rules to false.",
        ),
        "gateway.networking.k8s.io": (
            "expose.type",
            "Install the Gateway API and a controller, or choose another expose or upgrade type.",
        ),
    }
    for api in needs.apis:
        if (api.group, api.plural) in facts.served:
            continue
        key, hint = hints.get(api.group, ("extra.objects", "Install what defines that kind."))
        yield Problem(
            key, f"this cluster does not know {api.kind} of {api.group}/{api.version}", hint
        )
    for name, version in (facts.stored or {}).items():
        if version != "v1":
            yield Problem(
                "KubeRay",
                f"its definition {name} stores {version}; v1 is needed",
                "Upgrade KubeRay's definitions: kubectl apply --server-side -k"
                " of the operator's version.",
            )
    if facts.has_old_definition:
        yield Problem(
            "KubeRay",
            "its definition of RayService is older than 1.7 (it knows no spec.suspend)",
            "Helm never upgrades definitions: kubectl apply --server-side those of the operator.",
        )
    if needs.has_image_volume and facts.version < IMAGE_VOLUMES:
        yield Problem(
            "weights.from",
            f"image needs Kubernetes >= 1.35, this is {facts.version[0]}.{facts.version[1]}",
            "Choose pvc or ephemeral.",
        )


def _operator(facts: Facts, values: dict[str, Any]) -> Iterator[Problem]:
    if facts.operators is None:
        return
    if not facts.operators:
        yield Problem(
            "KubeRay",
            "no operator runs in this cluster, so nothing would come of a RayService",
            "Install it: helm install kuberay-operator, from KubeRay's chart repository.",
        )
    for operator in facts.operators:
        where = f"{operator.namespace}/{operator.name}"
        if not operator.is_available:
            yield Problem(
                "KubeRay",
                f"its operator {where} is not available",
                f"See: kubectl -n {operator.namespace} describe deployment {operator.name}",
            )
        version = _VERSION.search(operator.image)
        if version is not None and (int(version[1]), int(version[2])) < OLDEST_KUBERAY:
            yield Problem(
                "KubeRay",
                f"its operator {where} is {version[1]}.{version[2]}; Shoal needs 1.7 or later",
                "Upgrade it and its definitions together.",
            )
        wanted = values.get("security", {}).get("operatorNamespace", "kuberay-system")
        has_policy = values.get("security", {}).get("networkPolicy", True)
        if has_policy and operator.namespace != wanted:
            yield Problem(
                "security.operatorNamespace",
                f"is {wanted}, but KubeRay runs in {operator.namespace}: the NetworkPolicy would"
                " keep it from the head, and Serve would never be deployed",
                f"Set it: --set security.operatorNamespace={operator.namespace}",
            )


def _secrets(
    facts: Facts, needs: Needs, values: dict[str, Any], namespace: str
) -> Iterator[Problem]:
    for need in needs.secrets:
        key = key_of(values, need.name) or f"Secret {need.name}"
        is_made = need.is_ray_token and not key_of(values, need.name)
        if need.name in facts.unseen_secrets or is_made:
            continue
        found = facts.secrets.get(need.name)
        wanted = values.get("auth", {}).get("apiKeys", {}).get("key", "keys")
        if found is None:
            yield Problem(
                key,
                f"there is no Secret {need.name!r} in namespace {namespace}",
                _making(need, namespace),
            )
        elif need.holds_keys:
            yield from _keys_problem(key, need, found.get(wanted), wanted, namespace)
        elif need.key and need.key not in found:
            has = ", ".join(sorted(found)) or "nothing"
            yield Problem(key, f"Secret {need.name!r} has no key {need.key!r}; it has: {has}")


def _keys_problem(
    key: str, need: SecretNeed, text: str | None, wanted: str, namespace: str
) -> Iterator[Problem]:
    if text is None:
        message = f"Secret {need.name!r} has no key {wanted!r} with API keys"
        yield Problem(key, message, _making(need, namespace))
        return
    try:
        keys = parse_keys(text, source=f"Secret {need.name}, key {wanted}")
    except ConfigurationError as exc:
        yield Problem(key, exc.message, "Make a new one with: shoal keys create")
        return
    if not keys:
        yield Problem(
            key,
            f"Secret {need.name!r} holds no API key, so nobody could ask anything",
            _making(need, namespace),
        )


def _making(need: SecretNeed, namespace: str) -> str:
    if need.holds_keys:
        return f"Make it: shoal keys create me --secret {need.name} --namespace {namespace}"
    return (
        f"Make it: kubectl -n {namespace} create secret generic {need.name}"
        f" --from-literal={need.key or 'KEY'}=VALUE"
    )


def _storage(
    facts: Facts, needs: Needs, values: dict[str, Any], namespace: str
) -> Iterator[Problem]:
    classes = facts.storage_classes
    for wanted in needs.storage_classes if classes is not None else ():
        assert classes is not None
        names = ", ".join(sorted(classes)) or "none"
        if wanted and wanted not in classes:
            yield Problem(
                "weights.pvc.storageClass",
                f"there is no StorageClass {wanted!r}; there are: {names}",
            )
        elif not wanted and not any(classes.values()):
            yield Problem(
                "weights.pvc.storageClass",
                f"is empty, and no StorageClass is the default one; there are: {names}",
                "Name one: --set weights.pvc.storageClass=NAME",
            )
    for name, claim in facts.claims.items():
        key = key_of(values, name) or f"PersistentVolumeClaim {name}"
        if claim is None:
            yield Problem(key, f"there is no PersistentVolumeClaim {name!r} in {namespace}")
        elif (claim.get("status") or {}).get("phase") == "Lost":
            yield Problem(key, f"the PersistentVolumeClaim {name!r} has lost its volume")


def _classes(facts: Facts, needs: Needs) -> Iterator[Problem]:
    for name in needs.priority_classes:
        if facts.priority_classes is not None and name not in facts.priority_classes:
            yield Problem("scheduling.priorityClassName", f"there is no PriorityClass {name!r}")
    for name in needs.runtime_classes:
        if facts.runtime_classes is not None and name not in facts.runtime_classes:
            yield Problem(
                "hardware.overrides.pod.runtime_class", f"there is no RuntimeClass {name!r}"
            )


def _capacity(facts: Facts, needs: Needs) -> Iterator[Problem]:
    if facts.nodes is None:
        return
    for line in shortages(needs.pods, facts.nodes):
        yield Problem(
            "hardware.preset",
            line,
            "Free or add a node, choose another preset, or set node_selector and tolerations in"
            " hardware.overrides.pod. If nodes are added when pods wait: --ignore-capacity",
            is_capacity=True,
        )


def _unseen(facts: Facts) -> Iterator[Problem]:
    if facts.unseen:
        unseen = ", ".join(dict.fromkeys(str(right) for right in facts.unseen))
        yield Problem(
            "permissions",
            f"not checked, because you may not {unseen}",
            is_warning=True,
        )


def key_of(values: Any, wanted: str, path: str = "") -> str:
    """The path of the value that is `wanted`; empty if there is none."""
    if isinstance(values, dict):
        pairs = [(f"{path}.{key}" if path else str(key), inner) for key, inner in values.items()]
    elif isinstance(values, list | tuple):
        pairs = [(f"{path}[{index}]", inner) for index, inner in enumerate(values)]
    else:
        return path if values == wanted else ""
    return next((found for inner, value in pairs if (found := key_of(value, wanted, inner))), "")
