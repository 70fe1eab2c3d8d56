"""Renders the chart with the Helm 4 engine in this process, once for each case."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.cases import Case, Values

helm_python: Any = pytest.importorskip("helm_python", reason="no Helm engine for this platform")
CHART = Path(__file__).resolve().parents[2] / "helm" / "shoal"
RELEASE = "chat"
NAMESPACE = "models"
Object = dict[str, Any]


def load_chart(path: Path) -> Any:
    helm_python.disable_logging()
    return helm_python.Chart.load(path)


@cache
def _chart() -> Any:
    return load_chart(CHART)


@cache
def _texts(values: str) -> dict[str, str]:
    rendered = _chart().render(json.loads(values), name=RELEASE, namespace=NAMESPACE)
    return {path: text for path, text in rendered.items() if text.strip()}


def render_texts(values: Values) -> dict[str, str]:
    """Text by template; NOTES.txt among them."""
    return _texts(json.dumps(values))


@cache
def _objects(values: str) -> tuple[Object, ...]:
    return tuple(
        document
        for path, text in _texts(values).items()
        if not path.endswith("NOTES.txt")
        for document in yaml.load_all(text, Loader=yaml.CSafeLoader)
        if document
    )


def render(values: Values) -> tuple[Object, ...]:
    """The objects of a release."""
    return _objects(json.dumps(values))


def find(values: Values, kind: str) -> Object:
    """The only object of a kind."""
    (found,) = [item for item in render(values) if item["kind"] == kind]
    return found


def serve_config(case: Case) -> Object:
    text = find(case.values, "RayService")["spec"]["serveConfigV2"]
    config: Object = yaml.load(text, Loader=yaml.CSafeLoader)
    return config


def pod_specs(values: Values) -> dict[str, Object]:
    """Every pod of a release, as `{"metadata": ..., "spec": ...}` by what it is."""
    cluster = find(values, "RayService")["spec"]["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    pods = {"head": cluster["headGroupSpec"]["template"], "engine": group["template"]}
    return pods | {pod["metadata"]["name"]: pod for pod in render(values) if pod["kind"] == "Pod"}
