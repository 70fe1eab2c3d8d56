"""Rights in Kubernetes' words, and the Role that grants the ones that are missing.

Not asking for them (`cluster.kube`). The one decision: what a user lacks is printed as YAML that
an administrator can apply as it is, never only as "forbidden".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import yaml

from cluster.errors import ForbiddenError

_FORBIDDEN = re.compile(r'cannot (\S+) resource "([^"]+)" in API group "([^"]*)"')
ROLE = "shoal-user"


@dataclass(frozen=True, slots=True)
class Permission:
    """One right; `plural` may have a subresource, an empty `namespace` is the whole cluster."""

    verb: str
    group: str
    plural: str
    namespace: str = ""

    def __str__(self) -> str:
        return f"{self.verb} {self.kind}"

    @property
    def kind(self) -> str:
        """The plural with its group, as kubectl takes it."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


def missing_rules(permissions: list[Permission]) -> str:
    """Roles that grant `permissions`, as YAML to apply: one rule a kind, one object a namespace."""
    documents = []
    for namespace in dict.fromkeys(permission.namespace for permission in permissions):
        verbs: dict[tuple[str, str], list[str]] = {}
        for permission in permissions:
            if permission.namespace == namespace:
                verbs.setdefault((permission.group, permission.plural), []).append(permission.verb)
        rules = [
            {"apiGroups": [group], "resources": [plural], "verbs": list(dict.fromkeys(wanted))}
            for (group, plural), wanted in verbs.items()
        ]
        documents.append(
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "Role" if namespace else "ClusterRole",
                "metadata": {"name": ROLE, **({"namespace": namespace} if namespace else {})},
                "rules": rules,
            }
        )
    return "---\n".join(
        yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=100)
        for document in documents
    )


def forbidden(message: str, *, namespace: str) -> ForbiddenError | None:
    """The error for the server's own words of a refusal; None if `message` is something else."""
    found = _FORBIDDEN.search(message)
    if found is None:
        return None
    scope = namespace if "in the namespace" in message else ""
    permission = Permission(found[1], found[3], found[2], scope)
    return ForbiddenError(
        f"not allowed: {message}",
        hint=f"Ask an administrator for:\n{missing_rules([permission])}",
    )
