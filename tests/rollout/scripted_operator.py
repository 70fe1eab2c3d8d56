"""A scripted writer of RayService status: the seam that no test here can hold against the real one.

KubeRay's operator cannot be built here, so this plays it on a real API server, as KUBERNETES.md
5.6 and the operator's documentation (1.7.0) tell its behaviour: the finalizer, clusters with a
random suffix, a hash that decides about a new cluster and leaves bounds and tolerations out,
suspension that is reported before the pods are gone, `None` that parks in silence, `NewCluster`
that waits for room for ever, Warning events where a pod is refused. What it writes is what the
commands read; that the real operator writes the same is checked outside the suite.

`script` is what a test changes: whether the operator lives, whether a second cluster finds room,
what befalls pods and applications.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import yaml

from scripts.control_plane import Api, RefusedError
from scripts.control_plane.kuberay import cluster_name, head_pod, worker_pods

Object = dict[str, Any]
FINALIZER = "ray.io/rayservice-finalizer"
_TICK_S = 0.1
_LETTERS = "bcdfghjklmnpqrstvwxz2456789"


@dataclass
class Script:
    """What happens. Defaults: everything goes well, in a few ticks."""

    is_alive: bool = True
    has_room: bool = True  # for the pods of a second cluster
    pods_stay_ticks: int = 4  # after "Suspended", as terminating pods do
    deploying_ticks: int = 2
    failures: dict[str, str] = field(default_factory=dict)  # application -> Serve's message
    pod_statuses: dict[str, Object] = field(default_factory=dict)  # "head" or a group
    node: str = ""  # where pods run; empty: on none
    refusal: str = ""  # why the API server takes no worker pod


class ScriptedOperator:
    """Reconciles every RayService of one namespace until `close`."""

    def __init__(self, api: Api, namespace: str, script: Script) -> None:
        self.script = script
        self._api = api
        self._namespace = namespace
        self._random = random.Random(7)
        self._deploying: dict[str, int] = {}
        self._submitted: dict[str, str] = {}
        self._ending: list[tuple[int, str]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="operator", daemon=True)
        self.failure: BaseException | None = None

    def __enter__(self) -> ScriptedOperator:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        try:
            while not self._ended.wait(_TICK_S):
                if self.script.is_alive:
                    self._tick()
        except BaseException as exc:
            self.failure = exc

    def _tick(self) -> None:
        for service in self._list("ray.io/v1", "RayService"):
            with suppress(RefusedError):  # changed or gone in between: the next tick sees it
                self._reconcile(service)
        self._end_pods()

    def _reconcile(self, service: Object) -> None:
        metadata = service["metadata"]
        if "deletionTimestamp" in metadata:
            for cluster in self._clusters(service):
                self._delete_cluster(cluster)
            self._api.merge(service, {"metadata": {"finalizers": None}})
        elif FINALIZER not in metadata.get("finalizers", []):
            self._api.merge(service, {"metadata": {"finalizers": [FINALIZER]}})
        elif not self._suspend(service):
            self._serve(service)

    def _suspend(self, service: Object) -> bool:
        """Whether suspension is all there is to do."""
        status = service.get("status", {})
        if _is_true(status, "Suspended"):
            if not service["spec"].get("suspend"):
                self._write(service, Suspended=False, Ready=(False, "Initializing"))
            return True
        if _is_true(status, "Suspending"):
            clusters = self._clusters(service)
            for cluster in clusters:
                self._delete_cluster(cluster)
            if not clusters:
                self._write(service, Suspending=False, Suspended=True)
            return True
        if service["spec"].get("suspend"):
            self._write(
                service,
                Suspending=True,
                Ready=(False, "SuspendInProgress"),
                UpgradeInProgress=False,
                activeServiceStatus=None,
                pendingServiceStatus=None,
            )
            return True
        return False

    def _serve(self, service: Object) -> None:
        status = service.get("status", {})
        clusters = {found["metadata"]["name"]: found for found in self._clusters(service)}
        active = clusters.get(status.get("activeServiceStatus", {}).get("rayClusterName", ""))
        pending = clusters.get(status.get("pendingServiceStatus", {}).get("rayClusterName", ""))
        newest = pending or active
        kind = service["spec"].get("upgradeStrategy", {}).get("type", "NewCluster")
        if newest is None or (
            _hash(newest["spec"]) != _hash(service["spec"]["rayClusterConfig"]) and kind != "None"
        ):
            if pending is not None:  # a stalled one is swapped for another that waits as well
                self._delete_cluster(pending)
            pending = self._make_cluster(service)
        if pending is not None and (active is None or self.script.has_room):
            self._bring_up(service, active, pending)
        elif pending is not None:
            self._write(
                service,
                UpgradeInProgress=True,
                pendingServiceStatus={"rayClusterName": pending["metadata"]["name"]},
            )
        else:
            assert active is not None
            self._show_applications(service, active)

    def _bring_up(self, service: Object, active: Object | None, pending: Object) -> None:
        name = pending["metadata"]["name"]
        if active is not None and not _is_true(service.get("status", {}), "UpgradeInProgress"):
            self._write(
                service, UpgradeInProgress=True, pendingServiceStatus={"rayClusterName": name}
            )
            return
        if self.script.refusal or self.script.pod_statuses:
            self._write(
                service,
                Ready=(False, "Initializing"),
                pendingServiceStatus={"rayClusterName": name},
            )
            return
        applications = self._applications(service, name)
        is_ready = all(found["status"] == "RUNNING" for found in applications.values())
        if not is_ready:
            part = {"rayClusterName": name, "applicationStatuses": applications}
            self._write(
                service,
                pendingServiceStatus=part,
                **({} if active is not None else {"Ready": (False, "Initializing")}),
            )
            return
        self._write(
            service,
            Ready=(True, "NonZeroServeEndpoints"),
            UpgradeInProgress=False,
            numServeEndpoints=1,
            activeServiceStatus={"rayClusterName": name, "applicationStatuses": applications},
            pendingServiceStatus=None,
        )
        if active is not None:
            self._delete_cluster(active)

    def _show_applications(self, service: Object, active: Object) -> None:
        name = active["metadata"]["name"]
        self._write(
            service,
            activeServiceStatus={
                "rayClusterName": name,
                "applicationStatuses": self._applications(service, name),
            },
        )

    def _applications(self, service: Object, cluster: str) -> Object:
        """Every application deploys for some ticks after a change, then runs or has failed."""
        config = service["spec"]["serveConfigV2"]
        if self._submitted.get(cluster) != config:
            self._submitted[cluster] = config
            self._deploying[cluster] = self.script.deploying_ticks
        is_deploying = self._deploying[cluster] > 0
        self._deploying[cluster] -= 1
        return {
            str(application["name"]): self._application(str(application["name"]), is_deploying)
            for application in yaml.load(config, Loader=yaml.CSafeLoader)["applications"]
        }

    def _application(self, name: str, is_deploying: bool) -> Object:
        if is_deploying:
            return {"status": "DEPLOYING", "serveDeploymentStatuses": {}}
        if name in self.script.failures:
            return {"status": "DEPLOY_FAILED", "message": self.script.failures[name]}
        deployment = "Ingress" if name == "shoal" else "Replica"
        return {
            "status": "RUNNING",
            "serveDeploymentStatuses": {deployment: {"status": "HEALTHY"}},
        }

    def _make_cluster(self, service: Object) -> Object:
        suffix = "".join(self._random.choices(_LETTERS, k=5))
        metadata = {
            "name": cluster_name(service, suffix=suffix),
            "namespace": self._namespace,
            "labels": {
                "ray.io/originated-from-cr-name": service["metadata"]["name"],
                "ray.io/originated-from-crd": "RayService",
            },
        }
        kind = {"apiVersion": "ray.io/v1", "kind": "RayCluster"}
        cluster = self._api.create(
            {**kind, "metadata": metadata, "spec": service["spec"]["rayClusterConfig"]}
        )
        account = {"name": metadata["name"], "namespace": self._namespace}
        self._api.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account})
        self._make_pod(head_pod(service, suffix=suffix), "head")
        if self.script.refusal:
            self._warn(cluster, "FailedToCreateWorkerPod", self.script.refusal)
        else:
            for pod in worker_pods(service, suffix=suffix):
                self._make_pod(pod, pod["metadata"]["labels"]["ray.io/group"])
        return cluster

    def _make_pod(self, pod: Object, group: str) -> None:
        is_second = len(self._list("ray.io/v1", "RayCluster")) > 1
        finds_room = self.script.has_room or not is_second
        if finds_room and self.script.node:
            pod["spec"]["nodeName"] = self.script.node
        made = self._api.create(pod)
        running = {
            "phase": "Running",
            "containerStatuses": [
                _container_status(container["name"], {"running": {}})
                for container in pod["spec"]["containers"]
            ],
        }
        waiting = {"phase": "Pending", "conditions": [_unschedulable()]}
        status = self.script.pod_statuses.get(group, running if finds_room else waiting)
        self._api.merge(made, {"status": status}, subresource="status")

    def _warn(self, item: Object, reason: str, message: str) -> None:
        self._api.create(
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {
                    "name": f"{item['metadata']['name']}.{reason.lower()}",
                    "namespace": self._namespace,
                },
                "involvedObject": {
                    "apiVersion": item["apiVersion"],
                    "kind": item["kind"],
                    "name": item["metadata"]["name"],
                    "namespace": self._namespace,
                    "uid": item["metadata"]["uid"],
                },
                "type": "Warning",
                "reason": reason,
                "message": message,
            }
        )

    def _delete_cluster(self, cluster: Object) -> None:
        """The object goes at once; its pods end some ticks later, as with a grace period."""
        self._api.delete(cluster)
        self._ending.append((self.script.pods_stay_ticks, cluster["metadata"]["name"]))

    def _end_pods(self) -> None:
        self._ending = [(ticks - 1, name) for ticks, name in self._ending]
        for name in [name for ticks, name in self._ending if ticks < 0]:
            for pod in self._list("v1", "Pod", labels=f"ray.io/cluster={name}"):
                self._api.delete(pod)
        self._ending = [entry for entry in self._ending if entry[0] >= 0]

    def _clusters(self, service: Object) -> list[Object]:
        label = f"ray.io/originated-from-cr-name={service['metadata']['name']}"
        return self._list("ray.io/v1", "RayCluster", labels=label)

    def _list(self, api_version: str, kind: str, labels: str = "") -> list[Object]:
        return self._api.list(api_version, kind, self._namespace, labels=labels)

    def _write(self, service: Object, **changes: Any) -> None:
        """Conditions are given as `Ready=(True, "Reason")` or `Suspended=True`, parts as they are.

        Nothing is written where nothing changes, as a real operator does.
        """
        old = service.get("status", {})
        status = copy.deepcopy(old)
        status["observedGeneration"] = service["metadata"]["generation"]
        conditions = {found["type"]: found for found in status.get("conditions", [])}
        for key, value in changes.items():
            if key[0].isupper():
                truth, reason = value if isinstance(value, tuple) else (value, key)
                conditions[key] = _condition(key, truth, reason, conditions.get(key))
            elif value is None:
                status.pop(key, None)
            else:
                status[key] = value
        status["conditions"] = list(conditions.values())
        if status != old:
            removed = {key: None for key in old if key not in status}
            for key in ("activeServiceStatus", "pendingServiceStatus"):
                _keep_whole(removed, old, status, key)
            self._api.merge(service, {"status": {**status, **removed}}, subresource="status")


def _keep_whole(removed: Object, old: Object, new: Object, key: str) -> None:
    """A merge patch joins mappings: what is not in the new one must be said to go."""
    if key in new and key in old:
        gone = {part: None for part in old[key] if part not in new[key]}
        removed[key] = {**new[key], **gone}


def _condition(kind: str, truth: bool, reason: str, old: Object | None) -> Object:
    status = "True" if truth else "False"
    if old is not None and (old["status"], old["reason"]) == (status, reason):
        return old
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": reason,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }


def _is_true(status: Object, kind: str) -> bool:
    return any(
        found["type"] == kind and found["status"] == "True"
        for found in status.get("conditions", [])
    )


def _container_status(name: str, state: Object) -> Object:
    return {
        "name": name,
        "image": "i",
        "imageID": "i",
        "ready": True,
        "restartCount": 0,
        "state": state,
    }


def _unschedulable() -> Object:
    return {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/1 nodes are available: 1 Insufficient nvidia.com/gpu.",
    }


def _hash(cluster: Object) -> str:
    """Of a specification, without what the operator leaves out of it."""

    def kept(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        if isinstance(value, dict):
            for key, inner in sorted(value.items()):
                if key not in _MUTED.get(path, ()):
                    yield from kept(inner, (*path, key))
        elif isinstance(value, list) and path == ("workerGroupSpecs",):
            for inner in value:
                yield from kept(inner, path)
        else:
            yield path, value

    text = json.dumps(list(kept(cluster, ())))
    return hashlib.sha256(text.encode()).hexdigest()


_MUTED = {
    (): ("upgradeStrategy", "suspend"),
    ("headGroupSpec", "template", "spec"): ("tolerations", "schedulingGates"),
    ("workerGroupSpecs",): ("replicas", "minReplicas", "maxReplicas"),
    ("workerGroupSpecs", "template", "spec"): ("tolerations", "schedulingGates"),
}
