"""A change inside rayClusterConfig replaces every pod: only what must change it may.

KubeRay compares a hash of that part, with the fields in IGNORED left out.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.helm_values.resolved import merge
from tests.chart.cases import SMALL, Values
from tests.chart.rendering import CHART, NAMESPACE, RELEASE, load_chart

BASE = merge(SMALL, {"image": {"tag": "1.0"}})
IGNORED = ("replicas", "minReplicas", "maxReplicas")


def hash_of(chart: Any, values: Values, **options: Any) -> str:
    rendered = chart.render(values, name=RELEASE, namespace=NAMESPACE, **options)
    service = yaml.safe_load(rendered["shoal/templates/rayservice.yaml"])
    cluster = service["spec"]["rayClusterConfig"]
    for group in cluster["workerGroupSpecs"]:
        for key in IGNORED:
            group.pop(key)
        group["template"]["spec"].pop("tolerations", None)
    return hashlib.sha256(json.dumps(cluster, sort_keys=True).encode()).hexdigest()


@pytest.fixture(scope="module")
def chart() -> Any:
    return load_chart(CHART)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"overrides": {"max_answer_tokens": 100, "max_model_len": 2048}}},
        {"model": {"overrides": {"engine": {"max_running_sequences": 3}}}},
        {"model": {"overrides": {"name": "renamed"}}, "weights": {"from": "baked"}},
        {"replicas": {"min": 2, "max": 9, "targetOngoing": 3}},
        {"ingressCopies": 4, "logLevel": "debug", "maxBodyBytes": 2048},
        {"upgrade": {"type": "NewCluster"}},
        {"suspend": True},
        {"expose": {"type": "ingress", "host": "a.example"}},
        {"monitoring": {"podMonitor": True, "rules": True}},
        {"security": {"networkPolicy": False}},
        {"podDisruptionBudget": {"minAvailable": 2}},
        {"hardware": {"overrides": {"has_spare": False, "threads_per_shard": 7}}},
    ],
    ids=json.dumps,
)
def test_change_of_configuration_keeps_the_pods(chart: Any, change: Values) -> None:
    before = BASE
    if "weights" in change:
        before = merge(BASE, {"weights": change["weights"]})
    assert hash_of(chart, before) == hash_of(chart, merge(before, change))


@pytest.mark.parametrize(
    "change",
    [
        {"image": {"tag": "1.1"}},
        {"extra": {"env": [{"name": "A", "value": "1"}]}},
        {"podLabels": {"a": "b"}},
        {"model": {"overrides": {"longest_generation_s": 900}}},
        {"tensorParallel": 1},
    ],
    ids=json.dumps,
)
def test_change_of_pods_replaces_them(chart: Any, change: Values) -> None:
    assert hash_of(chart, BASE) != hash_of(chart, merge(BASE, change))


def test_upgrade_to_a_new_chart_keeps_the_pods(chart: Any, tmp_path: Path) -> None:
    copy = tmp_path / "shoal"
    shutil.copytree(CHART, copy)
    about = yaml.safe_load((copy / "Chart.yaml").read_text())
    about |= {"version": "9.9.9", "appVersion": "9.9.9"}
    (copy / "Chart.yaml").write_text(yaml.safe_dump(about))
    newer = load_chart(copy)
    assert newer.version == "9.9.9"
    upgraded = hash_of(newer, BASE, is_upgrade=True, is_install=False, revision=7)
    assert upgraded == hash_of(chart, BASE)
