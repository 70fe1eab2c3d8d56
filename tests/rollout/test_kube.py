"""The client on a real API server: objects, rights, Secrets, and errors in plain words."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import ClusterError, ForbiddenError, UsageError
from cluster.kube import NODE, POD, RAY_CLUSTER, RAY_SERVICE, SECRET, Kind, SecretStore, connect
from cluster.permissions import Permission
from scripts.control_plane import ApiServer


@pytest.mark.apiserver
def test_objects_are_dictionaries(kubernetes: str) -> None:
    kube = connect(namespace=kubernetes)
    assert kube.context == "shoal"
    assert kube.get(SECRET, "absent") is None
    secret = kube.create(SECRET, {"metadata": {"name": "s"}, "stringData": {"a": "b"}})
    patched = kube.patch(SECRET, "s", {"metadata": {"labels": {"x": "y"}}})
    assert patched["metadata"]["labels"] == {"x": "y"}
    operations = [{"op": "test", "path": "/metadata/name", "value": "other"}]
    with pytest.raises(ClusterError, match="Kubernetes refused"):
        kube.patch(SECRET, "s", operations)
    assert [found["metadata"]["name"] for found in kube.select(SECRET, labels="x=y")] == ["s"]
    with pytest.raises(ClusterError, match="somebody else changed it"):
        kube.replace(SECRET, secret)
    kube.delete(SECRET, "s")
    kube.delete(SECRET, "s")
    assert kube.select(SECRET, labels="x=y") == []


@pytest.mark.apiserver
def test_what_the_server_serves_is_known(kubernetes: str) -> None:
    kube = connect(namespace=kubernetes)
    assert kube.version() >= (1, 36)
    assert {"rayservices", "rayclusters"} <= kube.resources("ray.io", "v1")
    assert kube.resources("no.such", "v1") == frozenset()
    assert kube.select(Kind("no.such", "v1", "things")) == []
    assert kube.last_line("absent", "engine") == ""


@pytest.mark.apiserver
def test_rights_are_asked_of_the_server(
    api_server: ApiServer, kubernetes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = f"reader-{kubernetes}"
    config = api_server.write_kubeconfig(user, namespace=kubernetes)
    rule = {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}
    api_server.grant(user, kubernetes, [rule])
    monkeypatch.setenv("KUBECONFIG", str(config))
    kube = connect()
    assert kube.namespace == kubernetes
    assert kube.is_allowed(Permission("list", "", "pods", kubernetes))
    assert not kube.is_allowed(Permission("delete", "", "pods", kubernetes))
    assert not kube.is_allowed(Permission("list", "", "pods", "default"))
    assert not kube.is_allowed(Permission("get", "", "pods/log", kubernetes))
    assert kube.select(POD) == []
    with pytest.raises(ForbiddenError) as refused:
        kube.select(RAY_CLUSTER)
    assert "kind: Role\n" in refused.value.hint
    assert "resources: [rayclusters]" in refused.value.hint
    assert f"namespace: {kubernetes}" in refused.value.hint
    with pytest.raises(ForbiddenError) as refused:
        kube.select(NODE)
    assert "kind: ClusterRole\n" in refused.value.hint


@pytest.mark.apiserver
def test_secret_store_reads_back_and_refuses_a_lost_race(kubernetes: str) -> None:
    store = SecretStore(None, kubernetes, "keys-of-mine", "keys")
    assert store.read() is None
    store.write("one", None)
    assert store.read() == "one"
    with pytest.raises(ClusterError, match="changed by somebody else"):
        store.write("three", "zero")
    store.write("two", "one")
    assert SecretStore("shoal", kubernetes, "keys-of-mine", "keys").read() == "two"
    assert SecretStore(None, kubernetes, "keys-of-mine", "other").read() is None


def test_no_kubeconfig_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="no kubeconfig"):
        connect()


def test_broken_kubeconfig_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("clusters: [")
    monkeypatch.setenv("KUBECONFIG", str(config))
    with pytest.raises(UsageError, match="cannot be used"):
        connect()


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: far\n"
        'clusters: [{name: c, cluster: {server: "http://127.0.0.1:1"}}]\n'
        "users: [{name: u, user: {token: t}}]\n"
        "contexts: [{name: far, context: {cluster: c, user: u, namespace: ns}}]\n"
    )
    monkeypatch.setenv("KUBECONFIG", str(config))


def test_server_that_does_not_answer_is_said(unreachable: None) -> None:
    kube = connect()
    assert (kube.context, kube.namespace) == ("far", "ns")
    with pytest.raises(ClusterError, match=r"http://127\.0\.0\.1:1 does not answer"):
        kube.select(RAY_SERVICE)


def test_unknown_context_names_the_known_ones(unreachable: None) -> None:
    with pytest.raises(UsageError) as refused:
        connect(context="near")
    assert refused.value.hint == "It has: far"
