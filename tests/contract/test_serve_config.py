"""What the chart renders for the operator, and the operator sends to Ray, deploys and answers."""

from __future__ import annotations

import copy
from typing import Any

import httpx
import pytest
import yaml

from cluster.local.ports import find_free_ports
from serve.keys import generate_key, hash_key

from .conftest import Cluster, authorization
from .ray_nodes import REPOSITORY, TOKEN

# The first test pays for the start; Ray may need several attempts on a busy machine.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
helm = pytest.importorskip("helm_python", reason="no Helm engine for this platform")

VALUES = {
    "model": {"preset": "demo"},
    "hardware": {"preset": "cpu"},
    "replicas": {"min": 1, "max": 2},
    "weights": {"from": "baked"},
    "auth": {"apiKeys": {"existingSecret": "shoal-keys"}},
}
APPLICATIONS = {"shoal", "model-shoal-demo"}
KEY = generate_key()


class Deployed:
    """A serve configuration that is RUNNING, and where its traffic goes in."""

    def __init__(self, cluster: Cluster, body: dict[str, Any]) -> None:
        self.cluster = cluster
        self.body = body
        self.urls = (
            f"http://127.0.0.1:{body['http_options']['port']}",  # the head's proxy
            f"http://127.0.0.1:{cluster.engine_http_port}",
        )

    def complete(self, url: str, key: str) -> httpx.Response:
        request = {"model": "shoal-demo", "prompt": "Hello", "max_tokens": 4}
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(f"{url}/v1/completions", json=request, headers=headers, timeout=120)


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The chart's `serveConfigV2`, with this machine's port and folders in the place of a pod's."""
    helm.disable_logging()
    rendered = helm.Chart.load(REPOSITORY / "helm" / "shoal").render(VALUES, name="chat")
    (service,) = [
        document
        for path, text in rendered.items()
        if path.endswith(".yaml")
        for document in yaml.safe_load_all(text)
        if document and document["kind"] == "RayService"
    ]
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    (port,) = find_free_ports(1)
    text = service["spec"]["serveConfigV2"]
    for of_a_pod, here in {
        "host: 0.0.0.0": "host: 127.0.0.1",
        "port: 8000": f"port: {port}",
        "keys_file: /etc/shoal/keys/keys": f"keys_file: {keys}",
        "path: /opt/shoal/models/demo": f"path: {REPOSITORY / 'serve' / 'demo'}",
    }.items():
        assert text.count(of_a_pod) == (1 if "keys" in of_a_pod else 2)
        text = text.replace(of_a_pod, here)
    entry = {"name": "me", "sha256": hash_key(KEY).hex(), "created": "2026-01-01T00:00:00Z"}
    keys.write_text(yaml.safe_dump({"keys": [entry]}))
    found: dict[str, Any] = yaml.safe_load(text)
    return found


@pytest.fixture(scope="module")
def deployed(cluster: Cluster, body: dict[str, Any]) -> Deployed:
    refused = [cluster.put(body, headers).status_code for headers in ({}, authorization("f" * 32))]
    assert refused == [401, 403]
    assert cluster.applications() == {}
    answer = cluster.put(body, authorization(TOKEN))
    assert answer.status_code == 200, answer.text
    cluster.wait_running(APPLICATIONS)
    deployed = Deployed(cluster, body)
    cluster.wait_routed(deployed.urls)
    return deployed


def test_completion_comes_through_the_proxy_of_either_node(deployed: Deployed) -> None:
    for url in deployed.urls:
        answer = deployed.complete(url, KEY)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 4
        assert deployed.complete(url, "sk-wrong").status_code == 401


def test_probe_of_kuberay_passes_and_the_routes_are_nobodys_business(deployed: Deployed) -> None:
    for url in deployed.urls:
        probe = httpx.get(f"{url}/-/healthz", timeout=120)
        assert (probe.status_code, probe.text) == (200, "success")
        assert httpx.get(f"{url}/-/routes", timeout=120).status_code == 404


def test_scaling_bounds_change_in_place(deployed: Deployed) -> None:
    cluster = deployed.cluster
    before = cluster.replica_pids()
    changed: dict[str, Any] = copy.deepcopy(deployed.body)
    (model,) = [app for app in changed["applications"] if app["name"] == "model-shoal-demo"]
    model["deployments"][0]["autoscaling_config"]["max_replicas"] = 3
    assert cluster.put(changed, authorization(TOKEN)).status_code == 200
    cluster.wait_running(APPLICATIONS)
    config = cluster.applications()["model-shoal-demo"]["deployments"]["Replica"]
    assert config["deployment_config"]["autoscaling_config"]["max_replicas"] == 3
    assert cluster.replica_pids() == before
