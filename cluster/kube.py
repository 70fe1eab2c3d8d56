"""The Kubernetes API as Shoal uses it: plain dictionaries in and out, and one kind of error.

The only importer of `kubernetes`. Not a typed model of every object: pods and RayServices stay
the dictionaries that the server sent. The one decision: paths come from a table of the kinds that
Shoal touches instead of from discovery, so a command needs no right to discover, writes no cache
and fails with the name of the one right that it lacks.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import ClusterError, UsageError
from cluster.permissions import Permission, forbidden

Manifest = dict[str, Any]
_TIMEOUT_S = 15.0
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True, slots=True)
class Kind:
    """Where the API keeps one kind: `("ray.io", "v1", "rayservices")`; the core has no group."""

    group: str
    version: str
    plural: str
    is_namespaced: bool = True

    @property
    def prefix(self) -> str:
        """The path below which the API serves the kind's version."""
        return f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"

    def path(self, namespace: str, name: str = "", subresource: str = "") -> str:
        """The path of one object, or of all in `namespace` (empty: in every one)."""
        holder = f"/namespaces/{namespace}" if self.is_namespaced and namespace else ""
        tail = "".join(f"/{part}" for part in (name, subresource) if part)
        return f"{self.prefix}{holder}/{self.plural}{tail}"


RAY_SERVICE = Kind("ray.io", "v1", "rayservices")
RAY_CLUSTER = Kind("ray.io", "v1", "rayclusters")
POD = Kind("", "v1", "pods")
EVENT = Kind("", "v1", "events")
SECRET = Kind("", "v1", "secrets")
SERVICE = Kind("", "v1", "services")
INGRESS = Kind("networking.k8s.io", "v1", "ingresses")
HTTP_ROUTE = Kind("gateway.networking.k8s.io", "v1", "httproutes")
CLAIM = Kind("", "v1", "persistentvolumeclaims")
NODE = Kind("", "v1", "nodes", is_namespaced=False)
NAMESPACE = Kind("", "v1", "namespaces", is_namespaced=False)
DEPLOYMENT = Kind("apps", "v1", "deployments")
STORAGE_CLASS = Kind("storage.k8s.io", "v1", "storageclasses", is_namespaced=False)
PRIORITY_CLASS = Kind("scheduling.k8s.io", "v1", "priorityclasses", is_namespaced=False)
RUNTIME_CLASS = Kind("node.k8s.io", "v1", "runtimeclasses", is_namespaced=False)
DEFINITION = Kind("apiextensions.k8s.io", "v1", "customresourcedefinitions", is_namespaced=False)


class Kube:
    """One cluster and one namespace of it, as the user's kubeconfig reaches them."""

    def __init__(self, api: Any, *, context: str, namespace: str) -> None:
        self._api = api
        self.context = context
        self.namespace = namespace

    def get(self, kind: Kind, name: str, *, namespace: str | None = None) -> Manifest | None:
        """The object, or None where there is none (nor the kind itself)."""
        return self._call("GET", kind.path(self._in(namespace), name), is_optional=True)

    def select(
        self, kind: Kind, *, labels: str = "", fields: str = "", namespace: str | None = None
    ) -> list[Manifest]:
        """All objects of a kind that the selectors choose; an empty `namespace` means everywhere.

        A kind that the cluster does not know has none.
        """
        query = {"labelSelector": labels, "fieldSelector": fields}
        path = kind.path(self._in(namespace))
        answer = self._call("GET", path, query=query, is_optional=True)
        return list(answer["items"]) if answer is not None else []

    def create(self, kind: Kind, manifest: Manifest, *, namespace: str | None = None) -> Manifest:
        """Make an object."""
        return self._sure("POST", kind.path(self._in(namespace)), body=manifest)

    def replace(self, kind: Kind, manifest: Manifest) -> Manifest:
        """Write an object over the one it was read from: refused if that changed in between."""
        path = kind.path(self.namespace, manifest["metadata"]["name"])
        return self._sure("PUT", path, body=manifest)

    def patch(self, kind: Kind, name: str, patch: Manifest | list[Manifest]) -> Manifest:
        """Change parts of an object: a mapping merges, a list is of JSON patch operations."""
        style = "json-patch" if isinstance(patch, list) else "merge-patch"
        return self._sure("PATCH", kind.path(self.namespace, name), body=patch, style=style)

    def delete(self, kind: Kind, name: str) -> None:
        """Ask for an object's end; one that is gone already is fine."""
        self._call("DELETE", kind.path(self.namespace, name), is_optional=True)

    def version(self) -> tuple[int, int]:
        """The server's version, as `(1, 36)`."""
        answer = self._sure("GET", "/version")
        return int(re.sub(r"\D", "", answer["major"])), int(re.sub(r"\D", "", answer["minor"]))

    def resources(self, group: str, version: str) -> frozenset[str]:
        """Plurals of the kinds that the API serves; empty where it does not know the group."""
        answer = self._call("GET", f"/apis/{group}/{version}", is_optional=True)
        return frozenset(str(entry["name"]) for entry in (answer or {}).get("resources", []))

    def last_line(self, pod: str, container: str) -> str:
        """The newest line of a container's log; empty where there is none (yet)."""
        path = POD.path(self.namespace, pod, "log")
        query = {"container": container, "tailLines": "1"}
        status, text = self._send("GET", path, query=query, accept="*/*")
        return text.strip() if status == 200 else ""

    def is_allowed(self, permission: Permission) -> bool:
        """Whether the user has a right, in the server's own words."""
        attributes = {
            "verb": permission.verb,
            "group": permission.group,
            "resource": permission.plural.partition("/")[0],
            "subresource": permission.plural.partition("/")[2],
            "namespace": permission.namespace,
        }
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        return bool(self._sure("POST", path, body=review)["status"].get("allowed", False))

    def _in(self, namespace: str | None) -> str:
        return self.namespace if namespace is None else namespace

    def _sure(self, method: str, path: str, **options: Any) -> Manifest:
        answer = self._call(method, path, **options)
        assert answer is not None, "only optional answers may be None"
        return answer

    def _call(
        self, method: str, path: str, *, is_optional: bool = False, **options: Any
    ) -> Manifest | None:
        status, text = self._send(method, path, **options)
        if status == 404 and is_optional:
            return None
        if not 200 <= status < 300:
            raise _refused(status, text, self.namespace)
        return dict(json.loads(text))

    def _send(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: Any = None,
        style: str = "",
        accept: str = "application/json",
    ) -> tuple[int, str]:
        from urllib3.exceptions import HTTPError

        content_type = f"application/{style}+json" if style else "application/json"
        try:
            request = self._api.param_serialize(
                method,
                path,
                query_params=[(key, value) for key, value in (query or {}).items() if value],
                header_params={"Accept": accept, "Content-Type": content_type},
                body=body,
                auth_settings=["BearerToken"],
            )
            response = self._api.call_api(*request, _request_timeout=_TIMEOUT_S)
            return int(response.status), response.read().decode(errors="replace")
        except (HTTPError, OSError) as exc:
            raise _unreachable(self._api.configuration.host, exc) from exc


class SecretStore:
    """One key of one Secret as a text file: what `shoal keys --secret` reads and writes."""

    def __init__(self, context: str | None, namespace: str | None, name: str, key: str) -> None:
        self._kube = connect(context=context, namespace=namespace)
        self._name = name
        self._key = key

    @property
    def place(self) -> str:
        """Where it is, for a message."""
        return f"key {self._key!r} of Secret {self._kube.namespace}/{self._name}"

    @property
    def options(self) -> str:
        """What leads `shoal keys` to it."""
        where = f"--context {self._kube.context} --namespace {self._kube.namespace}"
        return f" --secret {self._name} {where}"

    def read(self) -> str | None:
        """The text; None without the Secret or without the key.

        Raises:
            ClusterError: it cannot be read, or is not text.
        """
        return self._text_of(self._kube.get(SECRET, self._name))

    def write(self, text: str, previous: str | None) -> None:
        """Put `text` where `previous` is (None: nothing), making the Secret if there is none.

        Raises:
            ClusterError: it cannot be written, or no longer holds `previous`.
        """
        encoded = base64.b64encode(text.encode()).decode()
        found = self._kube.get(SECRET, self._name)
        if self._text_of(found) != previous:
            raise _changed(self.place)
        if found is None:
            made = {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": self._name},
                "data": {self._key: encoded},
            }
            self._kube.create(SECRET, made)
        else:
            # With the version that was read: a write in between is refused by the server.
            self._kube.replace(
                SECRET, found | {"data": {**found.get("data", {}), self._key: encoded}}
            )

    def _text_of(self, secret: Manifest | None) -> str | None:
        encoded = (secret or {}).get("data", {}).get(self._key)
        try:
            return None if encoded is None else base64.b64decode(encoded).decode()
        except UnicodeDecodeError as exc:
            raise ClusterError(f"{self.place} is not text: byte {exc.start} is not UTF-8") from exc


def connect(*, context: str | None = None, namespace: str | None = None) -> Kube:
    """The cluster of a context (None: the current one), without asking it anything yet.

    `KUBECONFIG`, then `~/.kube/config`, then the service account of the pod this runs in.

    Raises:
        UsageError: no kubeconfig, or no such context in it.
    """
    from kubernetes import client

    config = _config()
    configuration = client.Configuration()
    configuration.retries = False
    files = os.environ.get("KUBECONFIG") or str(Path("~/.kube/config").expanduser())
    if not any(Path(file).is_file() for file in files.split(os.pathsep)):
        if context is None and _SERVICE_ACCOUNT.is_file():
            config.load_incluster_config(client_configuration=configuration)
            own = namespace or _SERVICE_ACCOUNT.read_text(encoding="ascii").strip()
            return Kube(client.ApiClient(configuration), context="in-cluster", namespace=own)
        raise UsageError(
            f"no kubeconfig: {files} does not exist",
            hint="Write one with your provider's tool, or name it: export KUBECONFIG=FILE",
        )
    with _kubeconfig_errors(files):
        contexts, current = config.list_kube_config_contexts(files)
        chosen = _choose(contexts, current, context)
        config.load_kube_config(
            files, context=chosen["name"], client_configuration=configuration, persist_config=False
        )
    return Kube(
        client.ApiClient(configuration),
        context=chosen["name"],
        namespace=namespace or chosen["context"].get("namespace") or "default",
    )


def _config() -> Any:
    from kubernetes import config

    return config


def _choose(contexts: list[Manifest], current: Manifest | None, wanted: str | None) -> Manifest:
    if wanted is None and current is not None:
        return current
    for found in contexts:
        if found["name"] == wanted:
            return found
    names = ", ".join(found["name"] for found in contexts)
    raise UsageError(
        f"--context: no context named {wanted!r} in the kubeconfig", hint=f"It has: {names}"
    )


@contextlib.contextmanager
def _kubeconfig_errors(files: str) -> Iterator[None]:
    from kubernetes.config.config_exception import ConfigException

    try:
        yield
    except (ConfigException, OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as exc:
        reason = str(exc).replace("\n", " ")
        raise UsageError(
            f"the kubeconfig {files} cannot be used: {reason}",
            hint="See what it holds: kubectl config view",
        ) from exc


def _unreachable(host: str, error: Exception) -> ClusterError:
    reason = str(getattr(error, "reason", None) or error)
    reason = re.sub(r"^<[^>]*>: |\(Caused by |HTTPS?Connection(?:Pool)?\([^)]*\): ", "", reason)
    return ClusterError(
        f"the Kubernetes API at {host} does not answer: {reason}",
        hint="Is it the right context? See: kubectl config get-contexts; kubectl cluster-info",
    )


def _refused(status: int, body: str, namespace: str) -> ClusterError:
    try:
        message = str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        message = body.strip() or f"status {status}"
    if status == 401:
        return ClusterError(
            "the Kubernetes API does not accept the kubeconfig's credentials",
            hint="They may have expired: log in again with your provider's tool.",
        )
    if status == 409:
        return ClusterError(
            f"somebody else changed it at the same time: {message}", hint="Run the command again."
        )
    if status == 403 and (refusal := forbidden(message, namespace=namespace)) is not None:
        return refusal
    return ClusterError(f"Kubernetes refused: {message}")


def _changed(place: str) -> ClusterError:
    return ClusterError(
        f"{place} was changed by somebody else at the same time", hint="Run the command again."
    )
