"""Renderings of the real chart for tests that need no server, each made once."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

from cluster.helm import documents, open_helm

Object = dict[str, Any]
NAMESPACE = "chat"
DEMO: Object = {
    "model": {"preset": "demo"},
    "hardware": {"preset": "cpu"},
    "auth": {"apiKeys": {"existingSecret": "api-keys"}},
}
BOX: Object = {
    "model": {"preset": "qwen2.5-7b-instruct"},
    "hardware": {"preset": "rtx4090d-x4"},
    "auth": {"apiKeys": {"existingSecret": "api-keys"}},
}


def render(values: Object, **changes: Any) -> list[Object]:
    """Objects of the release `shoal`; `changes` are top-level values over `values`."""
    return copy.deepcopy(_render(json.dumps({**values, **changes}, sort_keys=True)))


@cache
def _render(values: str) -> list[Object]:
    engine = open_helm(context=None, namespace=NAMESPACE)
    return documents(engine.render(json.loads(values), name="shoal", namespace=NAMESPACE))
