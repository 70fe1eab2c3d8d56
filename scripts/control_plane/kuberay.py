"""The pods that KubeRay would make of a RayService, for servers without KubeRay.

Written from the operator's documented behaviour (1.7.0): which labels, containers, mounts and
variables it adds to the templates. Not the operator: it makes one head and one worker of each
group, and neither watches nor writes a status. Only what admission and scheduling can see is here;
the commands that it puts into containers are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from .api import Object

_SHM, _LOGS = "/dev/shm", "/tmp/ray"
_PULL = "imagePullPolicy"


def head_pod(service: Mapping[str, Any], *, suffix: str = "abcde") -> Object:
    """The head of `service`'s RayCluster, with the autoscaler beside it where it is enabled."""
    cluster = service["spec"]["rayClusterConfig"]
    pod = _pod(service, cluster["headGroupSpec"], "head", "headgroup", suffix=suffix)
    if cluster.get("enableInTreeAutoscaling"):
        _add_autoscaler(pod, cluster)
    return pod


def worker_pods(service: Mapping[str, Any], *, suffix: str = "abcde") -> list[Object]:
    """One worker of each group that wants any."""
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return [_worker(service, group, suffix) for group in groups]


def cluster_name(service: Mapping[str, Any], *, suffix: str = "abcde") -> str:
    """What the operator would call the RayCluster: its suffix is random there."""
    return f"{service['metadata']['name']}-{suffix}"


def _worker(service: Mapping[str, Any], group: Mapping[str, Any], suffix: str) -> Object:
    pod = _pod(service, group, "worker", group["groupName"], suffix=suffix)
    spec, ray = pod["spec"], pod["spec"]["containers"][0]
    waiting = {
        "name": "wait-gcs-ready",
        "image": ray["image"],
        "command": ["/bin/bash", "-lc", "--"],
        "args": ["until ray health-check; do sleep 5; done"],
        "env": copy.deepcopy(ray["env"]),
        "volumeMounts": copy.deepcopy(ray["volumeMounts"]),
        "resources": {
            "limits": {"cpu": "200m", "memory": "256Mi"},
            "requests": {"cpu": "200m", "memory": "256Mi"},
        },
        **{key: ray[key] for key in ("securityContext", _PULL) if key in ray},
    }
    spec["initContainers"] = [waiting, *spec.get("initContainers", [])]
    return pod


def _pod(
    service: Mapping[str, Any],
    group: Mapping[str, Any],
    node_type: str,
    group_name: str,
    *,
    suffix: str,
) -> Object:
    template = copy.deepcopy(dict(group["template"]))
    metadata = template.get("metadata", {})
    cluster = cluster_name(service, suffix=suffix)
    labels = {
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
        **metadata.get("labels", {}),
        "ray.io/is-ray-node": "yes",
        "ray.io/cluster": cluster,
        "ray.io/node-type": node_type,
        "ray.io/group": group_name,
        "ray.io/identifier": f"{cluster}-{node_type}",
    }
    if node_type == "worker":
        labels["ray.io/serve"] = "true"
    pod: Object = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "generateName": f"{cluster}-{group_name}-",
            "namespace": service["metadata"]["namespace"],
            "labels": labels,
            "annotations": metadata.get("annotations", {}),
        },
        "spec": template["spec"],
    }
    _add_to_ray_container(pod["spec"], service)
    return pod


def _add_to_ray_container(spec: Object, service: Mapping[str, Any]) -> None:
    ray = spec["containers"][0]
    memory = ray.get("resources", {}).get("limits", {}).get("memory")
    _mount(spec, ray, "shared-mem", _SHM, {"medium": "Memory", "sizeLimit": memory})
    environment = ray.setdefault("env", [])
    environment.append({"name": "RAY_PORT", "value": "6379"})
    options = service["spec"]["rayClusterConfig"].get("authOptions", {})
    if options.get("mode") == "token":
        name = options.get("secretName") or service["metadata"]["name"]
        token = {"secretKeyRef": {"name": name, "key": "auth_token"}}
        environment.append({"name": "RAY_AUTH_MODE", "value": "token"})
        environment.append({"name": "RAY_AUTH_TOKEN", "valueFrom": token})


def _add_autoscaler(pod: Object, cluster: Mapping[str, Any]) -> None:
    """The sidecar takes its security context and resources from the options, not from the head."""
    spec, ray = pod["spec"], pod["spec"]["containers"][0]
    options = cluster.get("autoscalerOptions", {})
    sidecar = {
        "name": "autoscaler",
        "image": options.get("image", ray["image"]),
        "command": ["/bin/bash", "-lc", "--"],
        "args": ["ray kuberay-autoscaler"],
        "env": [*options.get("env", [])],
        "resources": options.get(
            "resources",
            {
                "limits": {"cpu": "500m", "memory": "512Mi"},
                "requests": {"cpu": "500m", "memory": "512Mi"},
            },
        ),
        "volumeMounts": [*options.get("volumeMounts", [])],
        **{key: options[key] for key in ("securityContext", _PULL) if key in options},
    }
    _mount(spec, ray, "ray-logs", _LOGS, {})
    _mount(spec, sidecar, "ray-logs", _LOGS, {})
    spec["containers"].append(sidecar)
    spec.setdefault("serviceAccountName", pod["metadata"]["labels"]["ray.io/cluster"])


def _mount(spec: Object, container: Object, name: str, path: str, empty_dir: Object) -> None:
    """An emptyDir at `path`, unless the template mounts something there already."""
    mounts = container.setdefault("volumeMounts", [])
    if any(mount["mountPath"] == path for mount in mounts):
        return
    volumes = spec.setdefault("volumes", [])
    if all(volume["name"] != name for volume in volumes):
        volumes.append({"name": name, "emptyDir": empty_dir})
    mounts.append({"name": name, "mountPath": path})
