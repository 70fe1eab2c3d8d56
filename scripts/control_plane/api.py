"""Objects in and out of an API server as plain dictionaries.

Not the client that Shoal ships (`cluster.kube`): tests use this one to see what the other did.
Every write asks for strict field validation: a misspelt field is an error and is not pruned.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx

from .certificates import Credentials

Object = dict[str, Any]
FIELD_MANAGER = "shoal-test"
# Seconds of computing go into one big CRD; a crowded machine takes its time over it.
_TIMEOUT_S = 100.0
_CLUSTER_WIDE = {
    "Namespace",
    "Node",
    "PersistentVolume",
    "CustomResourceDefinition",
    "ClusterRole",
    "ClusterRoleBinding",
    "PriorityClass",
    "RuntimeClass",
    "StorageClass",
    "GatewayClass",
    "SubjectAccessReview",
    "SelfSubjectAccessReview",
    "SelfSubjectRulesReview",
}


class RefusedError(Exception):
    """The server said no; `status` is the HTTP status, the message is the server's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class NotFoundError(RefusedError):
    """There is no such object, or no such kind."""


class Api:
    """One user's view of the server at `url`."""

    def __init__(self, url: str, authority: Path, user: Credentials) -> None:
        context = ssl.create_default_context(cafile=str(authority))
        context.load_cert_chain(user.certificate, user.key)
        self._client = httpx.Client(
            base_url=url, verify=context, timeout=_TIMEOUT_S, trust_env=False
        )

    def create(self, item: Object, *, dry_run: bool = False) -> Object:
        """The stored object (with a dry run: what would be stored)."""
        path = _collection(item["apiVersion"], item["kind"], _namespace_of(item))
        return self.request("POST", _with(path, _write_query(dry_run)), item)

    def apply(self, item: Object, *, dry_run: bool = False) -> Object:
        """Server-side apply of an object."""
        return self.apply_text(_path_of(item), json.dumps(item), dry_run=dry_run)

    def apply_text(self, path: str, text: str, *, dry_run: bool = False) -> Object:
        """Server-side apply of YAML, which the server parses, to the object at `path`."""
        query = {"fieldManager": FIELD_MANAGER, "force": "true", **_write_query(dry_run)}
        media_type = "application/apply-patch+yaml"
        return self.request("PATCH", _with(path, query), text, content_type=media_type)

    def merge(self, item: Mapping[str, Any], patch: Object, *, subresource: str = "") -> Object:
        """`item` with `patch` merged into it (or into its subresource)."""
        suffix = f"/{subresource}" if subresource else ""
        return self.request(
            "PATCH",
            _path_of(item) + suffix,
            patch,
            content_type="application/merge-patch+json",
        )

    def get(self, api_version: str, kind: str, name: str, namespace: str = "") -> Object:
        return self.request("GET", f"{_collection(api_version, kind, namespace)}/{name}")

    def list(
        self, api_version: str, kind: str, namespace: str = "", *, labels: str = ""
    ) -> list[Object]:
        """What there is in `namespace`; empty: in all of them."""
        path = _collection(api_version, kind, namespace)
        items = self.request("GET", _with(path, {"labelSelector": labels}))["items"]
        # A list says once what all its items are.
        return [{"apiVersion": api_version, "kind": kind, **item} for item in items]

    def delete(self, item: Mapping[str, Any], *, grace_s: int = 0) -> Object:
        return self.request("DELETE", _with(_path_of(item), {"gracePeriodSeconds": str(grace_s)}))

    def evict(self, pod: Mapping[str, Any]) -> None:
        """Asks for the end of a pod as a drain of its node does."""
        names = {key: pod["metadata"][key] for key in ("name", "namespace")}
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": names}
        self.request("POST", f"{_path_of(pod)}/eviction", eviction)

    def request(
        self,
        method: str,
        path: str,
        body: Object | str | None = None,
        *,
        content_type: str = "application/json",
    ) -> Object:
        """The answer to one call.

        Raises:
            RefusedError: any status but 2xx.
        """
        content = body if isinstance(body, str) or body is None else json.dumps(body)
        response = self._client.request(
            method, path, content=content, headers={"content-type": content_type}
        )
        if not response.is_success:
            is_absent = response.status_code == httpx.codes.NOT_FOUND
            error = NotFoundError if is_absent else RefusedError
            raise error(response.status_code, _message(response))
        answer: Object = response.json()
        return answer

    def is_up(self, path: str) -> bool:
        """Whether `path` answers 200 now."""
        try:
            return self._client.get(path).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self._client.close()


def _write_query(dry_run: bool) -> dict[str, str]:
    return {"fieldValidation": "Strict", **({"dryRun": "All"} if dry_run else {})}


def _path_of(item: Mapping[str, Any]) -> str:
    collection = _collection(item["apiVersion"], item["kind"], _namespace_of(item))
    return f"{collection}/{item['metadata']['name']}"


def _namespace_of(item: Mapping[str, Any]) -> str:
    return str(item.get("metadata", {}).get("namespace", ""))


def _collection(api_version: str, kind: str, namespace: str) -> str:
    root = "/apis" if "/" in api_version else "/api"
    within = f"/namespaces/{namespace}" if namespace and kind not in _CLUSTER_WIDE else ""
    return f"{root}/{api_version}{within}/{_plural(kind)}"


def _plural(kind: str) -> str:
    lower = kind.lower()
    if lower == "endpoints":
        return lower
    if lower.endswith("y") and not lower.endswith("ay"):
        return f"{lower[:-1]}ies"
    return f"{lower}es" if lower.endswith(("s", "x")) else f"{lower}s"


def _with(path: str, query: Mapping[str, str]) -> str:
    return f"{path}?{urlencode({key: value for key, value in query.items() if value})}"


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json().get("message", response.text))
    except json.JSONDecodeError:
        return response.text
