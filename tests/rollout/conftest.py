"""A cluster for commands: the real API server, the scripted operator, what a preflight wants."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest

from cluster.cli import main
from scripts.control_plane import Api, ApiServer, RefusedError
from serve.keys import ApiKey, generate_key, hash_key, render_keys
from tests.rollout.scripted_operator import Script, ScriptedOperator

Object = dict[str, Any]
DEMO = "--model demo --hardware cpu --set auth.apiKeys.existingSecret=api-keys"


@dataclass(frozen=True)
class Ended:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


Shoal = Callable[..., Ended]


@pytest.fixture
def shoal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shoal:
    """Run a command line in this process."""

    def run(command: str, *more: str) -> Ended:
        monkeypatch.setattr("sys.argv", ["shoal", *shlex.split(command), *more])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return Ended(int(ended.value.code or 0), printed.out, printed.err)

    return run


@pytest.fixture
def kubernetes(
    api_server: ApiServer, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A namespace in which a deployment passes the preflight; commands find it by KUBECONFIG."""
    api = api_server.api
    monkeypatch.setenv("KUBECONFIG", str(api_server.kubeconfig))
    monkeypatch.setattr("cluster.rollout.follow.POLL_S", 0.1)
    monkeypatch.setattr("cluster.rollout.release.SETTLE_S", 0.4)
    make_operator(api)
    make_keys_secret(api, namespace)
    node = make_node(api, f"node-{namespace}", {"cpu": "32", "memory": "256Gi", "pods": "110"})
    yield namespace
    api.delete(node)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def operator(api_server: ApiServer, kubernetes: str, script: Script) -> Iterator[ScriptedOperator]:
    """The scripted operator, at work in the namespace."""
    script.node = f"node-{kubernetes}"
    with ScriptedOperator(api_server.api, kubernetes, script) as running:
        yield running


def make_operator(api: Api) -> None:
    """KubeRay's Deployment, as available as its status says."""
    space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kuberay-system"}}
    with suppress(RefusedError):  # an earlier test made it
        api.create(space)
    labels = {"app.kubernetes.io/name": "kuberay-operator"}
    container = {"name": "operator", "image": "quay.io/kuberay/operator:v1.7.0"}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "kuberay-operator", "namespace": "kuberay-system", "labels": labels},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
        },
    }
    with suppress(RefusedError):
        api.create(deployment)
    status = {"replicas": 1, "readyReplicas": 1, "availableReplicas": 1}
    api.merge(deployment, {"status": status}, subresource="status")


def make_keys_secret(api: Api, namespace: str, name: str = "api-keys") -> None:
    """A Secret with one API key."""
    key = ApiKey("test", hash_key(generate_key()), datetime.now(UTC))
    data = {"keys": base64.b64encode(render_keys([key]).encode()).decode()}
    metadata = {"name": name, "namespace": namespace}
    api.create({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data})


def make_node(api: Api, name: str, allocatable: dict[str, str], **labels: str) -> Object:
    """A node that is ready and has these resources."""
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}
    made = api.create(node)
    ready = {"type": "Ready", "status": "True", "reason": "Test", "message": ""}
    status = {"capacity": allocatable, "allocatable": allocatable, "conditions": [ready]}
    api.merge(made, {"status": status}, subresource="status")
    api.merge(made, {"spec": {"taints": None}})
    return made
