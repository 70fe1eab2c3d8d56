"""The rights that Shoal asks an administrator for: enough for everything it does, and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.inventory.needs import needs_of
from cluster.kube import Kube, connect
from cluster.permissions import Permission, missing_rules
from scripts.control_plane import ApiServer

pytestmark = [pytest.mark.apiserver, pytest.mark.helm]

VALUES: dict[str, Any] = {
    "auth": {"apiKeys": {"existingSecret": "chat-keys"}},
    "expose": {"type": "ingress", "host": "chat.example.org"},
    "monitoring": {"podMonitor": True, "rules": True, "dashboards": True},
}


@pytest.fixture
def wanted(helm: Any) -> list[Permission]:
    """What a release of `VALUES` takes, as the preflight works it out of the rendering."""
    return list(needs_of(helm.render(VALUES, "--skip-tests"), namespace=helm.namespace).permissions)


@pytest.fixture
def grant(api_server: ApiServer, namespace: str, wanted: list[Permission]) -> Callable[[], None]:
    """Gives "deployer" the Role that Shoal prints."""

    def give() -> None:
        (role,) = yaml.safe_load_all(missing_rules(wanted))
        assert role["kind"] == "Role"
        api_server.grant("deployer", namespace, role["rules"])

    return give


@pytest.fixture
def kubeconfig(api_server: ApiServer, namespace: str) -> Path:
    """Signs in as "deployer", who has no rights of their own."""
    return api_server.write_kubeconfig("deployer", namespace=namespace)


@pytest.fixture
def kube(kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kube]:
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    return connect()


def test_server_allows_what_the_printed_role_says_and_nothing_else(
    kube: Kube, wanted: list[Permission], grant: Callable[[], None]
) -> None:
    before = [kube.is_allowed(permission) for permission in wanted]

    grant()

    assert not any(before)
    assert [permission for permission in wanted if not kube.is_allowed(permission)] == []
    elsewhere = [Permission(p.verb, p.group, p.plural, "default") for p in wanted]
    assert not any(kube.is_allowed(permission) for permission in elsewhere)
    beyond = [
        ("delete", "", "pods"),
        ("create", "", "pods/exec"),
        ("create", "apps", "deployments"),
    ]
    assert not any(kube.is_allowed(Permission(*right, kube.namespace)) for right in beyond)


def test_printed_role_is_enough_for_a_release_from_install_to_uninstall(
    helm: Any, kubeconfig: Path, grant: Callable[[], None]
) -> None:
    grant()
    deployer = helm.as_user(kubeconfig)

    deployer.install(VALUES)
    deployer.upgrade({**VALUES, "logLevel": "debug"})
    deployer("rollback", "chat", "1")
    deployer("uninstall", "chat")

    assert deployer("list", "--short") == ""


def test_without_the_role_helm_is_refused_and_nothing_is_made(
    helm: Any, kubeconfig: Path, api_server: ApiServer
) -> None:
    deployer = helm.as_user(kubeconfig)

    refused = deployer.run("install", "chat", str(helm.chart), *helm.written(VALUES))

    assert refused.returncode != 0
    assert "forbidden" in refused.stderr
    assert api_server.api.list("ray.io/v1", "RayService", helm.namespace) == []
