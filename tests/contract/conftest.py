"""One Ray cluster, as an operator finds it: running, with nothing deployed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from cluster.local.ports import find_free_ports

from .ray_nodes import TOKEN, RayNodes

DEPLOY_TIMEOUT_S = 240.0


def authorization(token: str) -> dict[str, str]:
    """The header in which the operator sends the token."""
    return {"x-ray-authorization": f"Bearer {token}"}


@dataclass(frozen=True)
class Cluster:
    """The dashboard's REST API, called as the operator calls it."""

    dashboard: str
    engine_http_port: int

    def put(self, body: dict[str, Any], headers: dict[str, str]) -> httpx.Response:
        """What the operator does with `serveConfigV2`."""
        address = f"{self.dashboard}/api/serve/applications/"
        return httpx.put(address, json=body, headers=headers, timeout=120)

    def applications(self) -> dict[str, Any]:
        """What the operator polls."""
        address = f"{self.dashboard}/api/serve/applications/?api_type=declarative"
        answer = httpx.get(address, headers=authorization(TOKEN), timeout=120)
        answer.raise_for_status()
        return dict(answer.json()["applications"])

    def wait_running(self, names: set[str]) -> None:
        """Return when exactly these applications are RUNNING."""
        deadline = time.monotonic() + DEPLOY_TIMEOUT_S
        while True:
            found = self.applications()
            statuses = {name: details["status"] for name, details in found.items()}
            if statuses == dict.fromkeys(names, "RUNNING"):
                return
            assert "DEPLOY_FAILED" not in statuses.values(), found
            assert time.monotonic() < deadline, found
            time.sleep(0.2)

    def wait_routed(self, urls: Sequence[str]) -> None:
        """Return when the proxy behind each of these has the API's route.

        Serve says RUNNING first; a proxy reads its new configuration in its own time.
        """
        deadline = time.monotonic() + DEPLOY_TIMEOUT_S
        for url in urls:
            while (answer := httpx.get(f"{url}/health/ready", timeout=120)).status_code != 200:
                assert time.monotonic() < deadline, answer.text
                time.sleep(0.2)

    def replica_pids(self) -> dict[str, int]:
        """Process of every Serve replica, by its id."""
        return {
            replica["replica_id"]: replica["pid"]
            for application in self.applications().values()
            for deployment in application["deployments"].values()
            for replica in deployment["replicas"]
        }


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and one engine node."""
    dashboard, engine_http = find_free_ports(2)
    nodes = RayNodes()
    try:
        head = nodes.start_head(dashboard_port=dashboard)
        nodes.start_engine(head, http_port=engine_http)
        yield Cluster(f"http://127.0.0.1:{dashboard}", engine_http)
    finally:
        nodes.stop()
