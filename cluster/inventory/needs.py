"""What a rendering of the chart needs from a cluster: pods, Secrets, claims, kinds, rights.

Pure, and read from the objects themselves: what is needed is what would be created, whatever values
led to it. The key of the values that names a thing is looked up afterwards, for the message.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster.permissions import Permission

from .quantity import parse_quantity

Manifest = dict[str, Any]
GPU = "nvidia.com/gpu"
KEYS_VOLUME = "keys"
_BUILT_IN = ("apps", "batch", "policy", "autoscaling")
_WRITE = ("get", "create", "patch", "delete")
# What following, upgrading and Helm's own records take, beside the objects of the chart.
_ALWAYS = (
    *(("ray.io", "rayservices", verb) for verb in ("get", "list", "watch")),
    *(("ray.io", "rayclusters", verb) for verb in ("get", "list", "patch")),
    *(("", "pods", verb) for verb in ("get", "list")),
    ("", "events", "list"),
    *(("", "secrets", verb) for verb in ("get", "list", "create", "update", "patch", "delete")),
)


@dataclass(frozen=True, slots=True)
class PodNeed:
    """`count` equal pods of one group; resources in cores, bytes and pieces."""

    group: str
    count: int
    resources: dict[str, float]
    node_selector: dict[str, str]
    tolerations: tuple[Manifest, ...]

    @property
    def num_gpus(self) -> int:
        """GPUs of one pod."""
        return int(self.resources.get(GPU, 0))


@dataclass(frozen=True, slots=True)
class SecretNeed:
    """A Secret that must exist, with `key` in it (empty: any).

    `holds_keys`: with API keys. `is_ray_token`: the chart makes it where no value names one, which
    a rendering without a server does not show.
    """

    name: str
    key: str = ""
    holds_keys: bool = False
    is_ray_token: bool = False


@dataclass(frozen=True, slots=True)
class ApiNeed:
    """A kind that is no part of Kubernetes itself."""

    group: str
    version: str
    kind: str

    @property
    def plural(self) -> str:
        return plural_of(self.kind)


@dataclass(frozen=True, slots=True)
class Needs:
    """Everything; `storage_classes` holds "" for the default one."""

    pods: tuple[PodNeed, ...]
    secrets: tuple[SecretNeed, ...]
    claims: tuple[str, ...]
    storage_classes: tuple[str, ...]
    priority_classes: tuple[str, ...]
    runtime_classes: tuple[str, ...]
    apis: tuple[ApiNeed, ...]
    has_image_volume: bool
    permissions: tuple[Permission, ...]


def needs_of(objects: list[Manifest], *, namespace: str) -> Needs:
    """What these objects need in `namespace`."""
    made = {(found["kind"], found["metadata"]["name"]) for found in objects}
    service = next(found for found in objects if found["kind"] == "RayService")
    specs = [spec for _, _, spec in _groups(service)]
    secrets = [
        secret
        for secret in (*_secrets(objects), *(need for spec in specs for need in _pod_secrets(spec)))
        if ("Secret", secret.name) not in made
    ]
    return Needs(
        pods=tuple(_pod_need(*group) for group in _groups(service)),
        secrets=tuple(dict.fromkeys(secrets)),
        claims=_unique(
            volume["persistentVolumeClaim"]["claimName"]
            for volume in _volumes(specs)
            if "persistentVolumeClaim" in volume
            and ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) not in made
        ),
        storage_classes=_unique(
            found["spec"].get("storageClassName", "")
            for found in objects
            if found["kind"] == "PersistentVolumeClaim"
        ),
        priority_classes=_unique(spec.get("priorityClassName") for spec in specs),
        runtime_classes=_unique(spec.get("runtimeClassName") for spec in specs),
        apis=tuple(dict.fromkeys(_apis(objects))),
        has_image_volume=any("image" in volume for volume in _volumes(specs)),
        permissions=tuple(dict.fromkeys(_permissions(objects, namespace))),
    )


def plural_of(kind: str) -> str:
    """The plural in the API's paths: right for every kind that a chart may hold."""
    name = kind.lower()
    if name.endswith(("s", "x", "ch")):
        return name + "es"
    return name[:-1] + "ies" if name.endswith("y") and name[-2] not in "aeiou" else name + "s"


def _groups(service: Manifest) -> Iterator[tuple[str, int, Manifest]]:
    cluster = service["spec"]["rayClusterConfig"]
    yield "head", 1, cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster.get("workerGroupSpecs", []):
        count = int(group.get("replicas", group.get("minReplicas", 1)))
        yield group["groupName"], count, group["template"]["spec"]


def _pod_need(group: str, count: int, spec: Manifest) -> PodNeed:
    total: dict[str, float] = {}
    for container in spec["containers"]:
        resources = container.get("resources") or {}
        wanted = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
        for name, quantity in wanted.items():
            total[name] = total.get(name, 0.0) + parse_quantity(quantity)
    return PodNeed(
        group=group,
        count=count,
        resources=total,
        node_selector=dict(spec.get("nodeSelector") or {}),
        tolerations=tuple(spec.get("tolerations") or ()),
    )


def _pod_secrets(spec: Manifest) -> Iterator[SecretNeed]:
    for entry in spec.get("imagePullSecrets") or []:
        yield SecretNeed(entry["name"])
    for volume in spec.get("volumes") or []:
        secret = volume.get("secret") or {}
        if secret and not secret.get("optional"):
            holds_keys = volume["name"] == KEYS_VOLUME
            yield SecretNeed(secret["secretName"], holds_keys=holds_keys)
    for container in (*(spec.get("initContainers") or []), *spec["containers"]):
        for variable in container.get("env") or []:
            found = (variable.get("valueFrom") or {}).get("secretKeyRef") or {}
            if found and not found.get("optional"):
                yield SecretNeed(found["name"], found["key"])
        for source in container.get("envFrom") or []:
            found = source.get("secretRef") or {}
            if found and not found.get("optional"):
                yield SecretNeed(found["name"])


def _secrets(objects: list[Manifest]) -> Iterator[SecretNeed]:
    for found in objects:
        if found["kind"] == "RayService":
            cluster = found["spec"]["rayClusterConfig"]
            token = (cluster.get("authOptions") or {}).get("secretName")
            if token:
                yield SecretNeed(token, "auth_token", is_ray_token=True)
            redis = (cluster.get("gcsFaultToleranceOptions") or {}).get("redisPassword") or {}
            reference = (redis.get("valueFrom") or {}).get("secretKeyRef")
            if reference:
                yield SecretNeed(reference["name"], reference["key"])
        elif found["kind"] == "Ingress":
            for entry in found["spec"].get("tls") or []:
                if entry.get("secretName"):
                    yield SecretNeed(entry["secretName"], "tls.crt")


def _volumes(specs: list[Manifest]) -> list[Manifest]:
    return [volume for spec in specs for volume in spec.get("volumes") or []]


def _apis(objects: list[Manifest]) -> Iterator[ApiNeed]:
    yield ApiNeed("ray.io", "v1", "RayCluster")
    for found in objects:
        group, _, version = found["apiVersion"].rpartition("/")
        is_own = group in ("", *_BUILT_IN) or group.endswith(".k8s.io")
        if not is_own or group == "gateway.networking.k8s.io":
            yield ApiNeed(group, version, found["kind"])
        strategy = found.get("spec", {}).get("upgradeStrategy") or {}
        if strategy.get("type") == "NewClusterWithIncrementalUpgrade":
            yield ApiNeed("gateway.networking.k8s.io", "v1", "Gateway")
            yield ApiNeed("gateway.networking.k8s.io", "v1", "HTTPRoute")


def _permissions(objects: list[Manifest], namespace: str) -> Iterator[Permission]:
    for group, plural, verb in _ALWAYS:
        yield Permission(verb, group, plural, namespace)
    for found in objects:
        group = found["apiVersion"].rpartition("/")[0]
        for verb in _WRITE:
            yield Permission(verb, group, plural_of(found["kind"]), namespace)


def _unique(names: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(name) for name in names if name is not None))
