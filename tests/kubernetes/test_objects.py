"""The server takes every object of every kind that the chart can render, strictly.

Strictly means that a field unknown to the server is an error. The whole matrix is checked against
the schemas (tests/chart); here is one rendering for each switch, with the server's own validation.
"""

from __future__ import annotations

from typing import Any

import pytest

from scripts.control_plane import ApiServer

pytestmark = [pytest.mark.apiserver, pytest.mark.helm]

KEYS = {"apiKeys": {"existingSecret": "chat-keys"}}
GATEWAY = {"gateway": {"name": "front", "namespace": "gateways"}}
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "box of 4090D": {"hardware": {"preset": "rtx4090d-x4"}},
    "demo on processors": {"model": {"preset": "demo"}, "hardware": {"preset": "cpu"}},
    "image volume": {"weights": {"from": "image", "ociImage": "example.org/weights:1"}},
    "existing claim": {"weights": {"pvc": {"existingClaim": "weights", "readOnly": True}}},
    "ephemeral weights": {"weights": {"from": "ephemeral"}},
    "new cluster": {"upgrade": {"type": "NewCluster"}},
    "incremental": {"upgrade": {"type": "Incremental", "incremental": {"gatewayClassName": "gw"}}},
    "ingress": {
        "expose": {
            "type": "ingress",
            "host": "chat.example.org",
            "ingress": {"className": "nginx", "tlsSecret": "chat-tls"},
        }
    },
    "httproute": {
        "expose": {"type": "httproute", "host": "chat.example.org", "httproute": GATEWAY}
    },
    "monitoring": {"monitoring": {"podMonitor": True, "rules": True, "dashboards": True}},
    "gcs fault tolerance": {
        "head": {"gcsFaultTolerance": {"enabled": True, "redisAddress": "redis:6379"}}
    },
    "two models": {
        "models": [{"preset": "qwen2.5-0.5b-instruct"}, {"preset": "qwen2.5-1.5b-instruct"}]
    },
    "scaled": {"replicas": {"min": 1, "max": 4}, "scheduling": {"queueName": "gpus"}},
    "suspended": {"suspend": True},
}


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_server_takes_every_object(
    values: dict[str, Any], helm: Any, api_server: ApiServer, namespace: str
) -> None:
    rendered = helm.render({"auth": KEYS, **values})

    stored = [api_server.api.create(item, dry_run=True) for item in rendered]

    assert "RayService" in {item["kind"] for item in stored}
    assert {item["metadata"].get("namespace", namespace) for item in stored} == {namespace}
