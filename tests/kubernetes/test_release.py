"""A release's life on a real server: installed, changed, taken back and removed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.control_plane import Api, ApiServer

pytestmark = [pytest.mark.apiserver, pytest.mark.helm]

VALUES: dict[str, Any] = {
    "model": {"preset": "qwen2.5-7b-instruct"},
    "hardware": {"preset": "rtx4090d-x4"},
    "auth": {"apiKeys": {"existingSecret": "chat-keys"}},
}
SMALLER = {**VALUES, "model": {"preset": "qwen2.5-3b-instruct"}}
# Each changes what Serve is told and must leave every pod alone.
CONFIG_ONLY: dict[str, dict[str, Any]] = {
    "answer length": {"model": {"overrides": {"max_answer_tokens": 1024}}},
    "log level": {"logLevel": "debug"},
    "load of a copy": {"replicas": {"max": 4, "targetOngoing": 8}},
    "ingress copies": {"ingressCopies": 3},
}


@pytest.fixture
def api(api_server: ApiServer) -> Api:
    return api_server.api


def stored(api: Api, namespace: str) -> dict[str, Any]:
    return api.get("ray.io/v1", "RayService", "chat", namespace)["spec"]


def pods_of(spec: dict[str, Any]) -> str:
    """What decides whether KubeRay makes a new cluster, byte for byte."""
    return json.dumps(spec["rayClusterConfig"], sort_keys=True)


def with_changes(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in changes.items():
        is_branch = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = with_changes(merged[key], value) if is_branch else value
    return merged


def test_every_rendered_object_is_stored(helm: Any, api: Api, namespace: str) -> None:
    helm.install(VALUES)

    rendered = list(yaml.safe_load_all(helm("get", "manifest", "chat")))
    assert {item["kind"] for item in rendered} >= {"RayService", "Service", "PersistentVolumeClaim"}
    for item in rendered:
        name = item["metadata"]["name"]
        assert api.get(item["apiVersion"], item["kind"], name, namespace)["metadata"]["uid"]


@pytest.mark.parametrize("change", CONFIG_ONLY.values(), ids=CONFIG_ONLY)
def test_config_only_change_reaches_serve_and_no_pod(
    change: dict[str, Any], helm: Any, api: Api, namespace: str
) -> None:
    helm.install(VALUES)
    before = stored(api, namespace)

    helm.upgrade(with_changes(VALUES, change))

    after = stored(api, namespace)
    assert pods_of(after) == pods_of(before)
    assert after["serveConfigV2"] != before["serveConfigV2"]


def test_new_chart_version_reaches_no_pod(
    helm: Any, api: Api, namespace: str, newer_chart: Path
) -> None:
    helm.install(VALUES)
    before = stored(api, namespace)

    helm.upgrade(VALUES, chart=newer_chart)

    assert stored(api, namespace) == before
    labels = api.get("ray.io/v1", "RayService", "chat", namespace)["metadata"]["labels"]
    assert labels["helm.sh/chart"] == "shoal-9.9.9"


@pytest.fixture
def newer_chart(tmp_path: Path) -> Path:
    """The same chart with a later version of its own, for the same version of Shoal."""
    chart = tmp_path / "newer" / "shoal"
    shutil.copytree(Path(__file__).parents[2] / "helm" / "shoal", chart)
    description = yaml.safe_load((chart / "Chart.yaml").read_text())
    (chart / "Chart.yaml").write_text(yaml.safe_dump({**description, "version": "9.9.9"}))
    return chart


def test_new_image_reaches_the_pods(helm: Any, api: Api, namespace: str) -> None:
    helm.install(VALUES)
    before = stored(api, namespace)

    helm.upgrade({**VALUES, "image": {"tag": "0.2.0-cuda"}})

    assert pods_of(stored(api, namespace)) != pods_of(before)


def test_upgrade_stores_what_an_install_would(helm: Any, api: Api, namespace: str) -> None:
    values = {
        "model": {"preset": "demo"},
        "hardware": {"preset": "cpu"},
        "auth": {"allowAnonymous": True},
        "autoscaler": {"enabled": False},
        "scheduling": {"topologySpread": False},
    }
    helm.install({**VALUES, "upgrade": {"type": "NewCluster"}, "podLabels": {"team": "search"}})

    helm.upgrade(values)

    (service,) = [item for item in helm.render(values) if item["kind"] == "RayService"]
    service["metadata"]["name"] = "fresh"
    assert stored(api, namespace) == api.create(service, dry_run=True)["spec"]


def test_rollback_brings_the_first_specification_back(helm: Any, api: Api, namespace: str) -> None:
    helm.install(VALUES)
    first = stored(api, namespace)
    helm.upgrade({**VALUES, "image": {"tag": "0.2.0-cuda"}, "logLevel": "debug"})

    helm("rollback", "chat", "1")

    assert stored(api, namespace) == first
    assert [entry["status"] for entry in helm.history()][-1] == "deployed"


def test_ray_token_outlives_upgrade_and_rollback(helm: Any, api: Api, namespace: str) -> None:
    helm.install(VALUES)
    tokens = [token(api, namespace)]
    helm.upgrade({**VALUES, "logLevel": "debug"})
    tokens.append(token(api, namespace))
    helm("rollback", "chat", "1")
    tokens.append(token(api, namespace))

    assert len(tokens[0]) >= 32
    assert len(set(tokens)) == 1


def token(api: Api, namespace: str) -> str:
    return str(api.get("v1", "Secret", "chat-ray-token", namespace)["data"]["auth_token"])


def test_weights_outlive_an_uninstall_and_are_adopted_by_the_next_install(
    helm: Any, api: Api, namespace: str
) -> None:
    helm.install(VALUES)
    claim = api.get("v1", "PersistentVolumeClaim", "chat-models", namespace)

    helm("uninstall", "chat")

    assert api.list("ray.io/v1", "RayService", namespace) == []
    kept = api.get("v1", "PersistentVolumeClaim", "chat-models", namespace)
    assert kept["metadata"]["uid"] == claim["metadata"]["uid"]
    helm.install(VALUES)
    assert api.list("ray.io/v1", "RayService", namespace) != []


@pytest.mark.parametrize("size", [{}, {"weights": {"pvc": {"size": "1Ti"}}}], ids=["plan", "own"])
def test_claim_keeps_its_size_when_a_smaller_model_comes(
    size: dict[str, Any], helm: Any, api: Api, namespace: str
) -> None:
    """A server refuses a claim that shrinks, and with it the whole upgrade."""
    helm.install({**VALUES, **size})
    before = requested(api, namespace)
    (smaller,) = [
        item["spec"]["resources"]["requests"]["storage"]
        for item in helm.render(SMALLER)
        if item["kind"] == "PersistentVolumeClaim"
    ]

    helm.upgrade(SMALLER)

    assert requested(api, namespace) == before
    assert before != smaller
    assert "qwen2.5-3b-instruct" in stored(api, namespace)["serveConfigV2"]


def requested(api: Api, namespace: str) -> str:
    claim = api.get("v1", "PersistentVolumeClaim", "chat-models", namespace)
    return str(claim["spec"]["resources"]["requests"]["storage"])


def test_suspend_stops_the_pods_and_keeps_what_they_need(
    helm: Any, api: Api, namespace: str
) -> None:
    helm.install(VALUES)
    before = stored(api, namespace)

    helm.upgrade({**VALUES, "suspend": True})

    assert stored(api, namespace) == {**before, "suspend": True}
    assert api.get("v1", "PersistentVolumeClaim", "chat-models", namespace)
    assert api.get("v1", "Service", "chat", namespace)
    assert token(api, namespace)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({**VALUES, "modle": {}}, "modle"),
        ({**VALUES, "tensorParallel": 3}, "tensorParallel"),
        ({**VALUES, "fullnameOverride": "a" * 48}, "fullnameOverride"),
        ({"model": {"preset": "demo"}}, "auth.apiKeys.existingSecret"),
        ({**VALUES, "upgrade": {"type": "Recreate"}}, "upgrade.type"),
        ({**VALUES, "model": {"preset": "qwen2.5-72b-instruct"}}, "model.preset"),
    ],
    ids=["unknown key", "tensor parallel", "long name", "no keys", "upgrade", "does not fit"],
)
def test_refused_values_name_the_key_and_leave_nothing(
    values: dict[str, Any], named: str, helm: Any, api: Api, namespace: str
) -> None:
    refused = helm.run("install", "chat", str(helm.chart), *helm.written(values))

    assert refused.returncode != 0
    assert named in refused.stderr.replace("/", ".")
    assert api.list("ray.io/v1", "RayService", namespace) == []
    assert api.list("v1", "Secret", namespace) == []


def test_longest_name_is_taken_by_the_server(helm: Any, api: Api, namespace: str) -> None:
    name = "a" * 47

    helm.install({**VALUES, "fullnameOverride": name})

    assert api.get("ray.io/v1", "RayService", name, namespace)
