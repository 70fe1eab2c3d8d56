"""The preflight without a cluster: every reason at once, each with its key and its next step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.inventory import Facts, Needs, Node, Operator, Problem, check, needs_of
from cluster.inventory.quantity import parse_quantity, render_amount
from cluster.permissions import Permission, missing_rules
from tests.rollout.rendering import BOX, DEMO, NAMESPACE, render

KEYS = f"keys:\n- {{name: a, sha256: {'0' * 64}, created: 2026-01-01T00:00:00Z}}\n"
BOX_FREE = {"cpu": 64.0, "memory": 512 * 1024.0**3, "nvidia.com/gpu": 4.0, "pods": 110.0}


@pytest.fixture(scope="module")
def needs() -> Needs:
    return needs_of(render(BOX), namespace=NAMESPACE)


@pytest.fixture
def facts() -> Facts:
    """A cluster that has everything that the box's rendering needs."""
    return Facts(
        version=(1, 36),
        namespace={},
        has_namespace=True,
        served=frozenset({("ray.io", "rayservices"), ("ray.io", "rayclusters")}),
        stored={"rayservices.ray.io": "v1", "rayclusters.ray.io": "v1"},
        has_old_definition=False,
        operators=(Operator("kuberay-system", "kuberay-operator", "operator:v1.7.0", True),),
        nodes=(Node("box", dict(BOX_FREE)),),
        storage_classes={"fast": True},
        priority_classes=frozenset(),
        runtime_classes=frozenset({"nvidia"}),
        secrets={"api-keys": {"keys": KEYS}},
    )


def problems_of(facts: Facts, needs: Needs, values: Any = BOX) -> list[Problem]:
    return check(facts, needs, values, namespace=NAMESPACE)


def test_a_cluster_that_has_everything_passes(facts: Facts, needs: Needs) -> None:
    assert problems_of(facts, needs) == []


def test_all_reasons_come_at_once(facts: Facts, needs: Needs) -> None:
    empty = replace(
        facts,
        has_namespace=False,
        served=frozenset(),
        operators=(),
        nodes=(),
        storage_classes={},
        secrets={"api-keys": None},
        denied=(Permission("create", "ray.io", "rayservices", NAMESPACE),),
    )
    keys = {problem.key for problem in problems_of(empty, needs)}
    assert keys == {
        "permissions",
        "--namespace",
        "KubeRay",
        "auth.apiKeys.existingSecret",
        "weights.pvc.storageClass",
        "hardware.preset",
    }


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"stored": {"rayservices.ray.io": "v1alpha1"}}, "KubeRay", "stores v1alpha1"),
        ({"has_old_definition": True}, "KubeRay", "spec.suspend"),
        (
            {"operators": (Operator("kuberay-system", "o", "kuberay/operator:v1.4.2", True),)},
            "KubeRay",
            "is 1.4",
        ),
        (
            {"operators": (Operator("kuberay-system", "o", "kuberay/operator:v1.7.0", False),)},
            "KubeRay",
            "not available",
        ),
        (
            {"operators": (Operator("ray", "o", "kuberay/operator:v1.7.0", True),)},
            "security.operatorNamespace",
            "runs in ray",
        ),
        ({"secrets": {"api-keys": {}}}, "auth.apiKeys.existingSecret", "no key 'keys'"),
        ({"secrets": {"api-keys": {"keys": "keys: 7"}}}, "auth.apiKeys.existingSecret", "keys"),
        ({"secrets": {"api-keys": {"keys": ""}}}, "auth.apiKeys.existingSecret", "no API key"),
        ({"storage_classes": {"slow": False}}, "weights.pvc.storageClass", "there are: slow"),
    ],
)
def test_each_lack_names_its_key(
    facts: Facts, needs: Needs, changes: dict[str, Any], key: str, words: str
) -> None:
    [problem] = problems_of(replace(facts, **changes), needs)
    assert problem.key == key
    assert words in problem.message


def test_what_may_not_be_seen_is_a_warning_and_no_guess(facts: Facts, needs: Needs) -> None:
    unseen = Permission("list", "", "nodes")
    blind = replace(
        facts, nodes=None, operators=None, stored=None, storage_classes=None, unseen=(unseen,)
    )
    [problem] = problems_of(blind, needs)
    assert problem.is_warning
    assert "list nodes" in problem.message


def test_image_volumes_need_a_new_kubernetes(facts: Facts) -> None:
    values = {**BOX, "weights": {"from": "image", "ociImage": "example.org/weights:1"}}
    found = problems_of(
        replace(facts, version=(1, 34)), needs_of(render(values), namespace=NAMESPACE), values
    )
    assert [(problem.key, "1.34" in problem.message) for problem in found] == [
        ("weights.from", True)
    ]


def test_secrets_are_named_by_the_value_that_names_them(facts: Facts) -> None:
    values = {
        **BOX,
        "image": {"pullSecrets": ["registry"]},
        "auth": {
            "apiKeys": {"existingSecret": "api-keys"},
            "hfToken": {"existingSecret": "hub"},
            "rayToken": {"existingSecret": "ray"},
        },
    }
    needs = needs_of(render(values), namespace=NAMESPACE)
    found = problems_of(replace(facts, secrets={"api-keys": {"keys": KEYS}}), needs, values)
    assert {problem.key for problem in found} == {
        "image.pullSecrets[0]",
        "auth.hfToken.existingSecret",
        "auth.rayToken.existingSecret",
    }
    assert all("create secret generic" in problem.hint for problem in found)


def test_token_that_the_chart_makes_is_not_asked_for(facts: Facts, needs: Needs) -> None:
    assert any(secret.is_ray_token for secret in needs.secrets)
    assert problems_of(facts, needs) == []


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (Node("n", {**BOX_FREE, "nvidia.com/gpu": 3.0}), "3 nvidia.com/gpu free"),
        (Node("n", dict(BOX_FREE), is_ready=False), "not ready"),
        (
            Node("n", dict(BOX_FREE), taints=({"key": "gpu", "effect": "NoSchedule"},)),
            "has taint gpu",
        ),
    ],
)
def test_no_room_says_why_each_node_takes_none(
    facts: Facts, needs: Needs, node: Node, reason: str
) -> None:
    head_node = Node("small", {"cpu": 4.0, "memory": 16 * 1024.0**3})
    [problem] = problems_of(replace(facts, nodes=(node, head_node)), needs)
    assert problem.is_capacity
    assert f"n: {reason}" in problem.message


def test_selectors_and_tolerations_are_respected(facts: Facts) -> None:
    pod = {
        "node_selector": {"gpu": "4090d"},
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    }
    values = {**BOX, "hardware": {"preset": "rtx4090d-x4", "overrides": {"pod": pod}}}
    needs = needs_of(render(values), namespace=NAMESPACE)
    taint = {"key": "gpu", "value": "yes", "effect": "NoSchedule"}
    right = Node("right", dict(BOX_FREE), {"gpu": "4090d"}, (taint,))
    small = Node("small", {"cpu": 4.0, "memory": 16 * 1024.0**3})
    wrong = Node("wrong", dict(BOX_FREE), {"gpu": "a100"})
    assert problems_of(replace(facts, nodes=(right, small)), needs, values) == []
    [problem] = problems_of(replace(facts, nodes=(wrong, small)), needs, values)
    assert "wrong: lacks label gpu=4090d" in problem.message


def test_two_copies_need_two_boxes(facts: Facts) -> None:
    needs = needs_of(render(BOX, replicas={"min": 2, "max": 2}), namespace=NAMESPACE)
    [problem] = problems_of(facts, needs)
    assert "room for 1 of 2 engine pods" in problem.message
    boxes = tuple(Node(name, dict(BOX_FREE)) for name in ("a", "b"))
    assert problems_of(replace(facts, nodes=boxes), needs) == []


def test_kinds_of_monitoring_and_gateways_are_asked_for(facts: Facts) -> None:
    values = {
        **DEMO,
        "monitoring": {"podMonitor": True},
        "expose": {"type": "httproute", "host": "h", "httproute": {"gateway": {"name": "g"}}},
    }
    needs = needs_of(render(values), namespace=NAMESPACE)
    keys = {problem.key for problem in problems_of(facts, needs, values)}
    assert keys == {"monitoring", "expose.type"}


def test_missing_rights_are_named_kind_by_kind(facts: Facts, needs: Needs) -> None:
    denied = tuple(Permission(verb, "ray.io", "rayservices", NAMESPACE) for verb in ("get", "list"))
    [problem] = problems_of(replace(facts, denied=denied), needs)
    assert problem.message == "you may not get/list rayservices.ray.io"


def test_missing_rights_are_one_role_to_apply() -> None:
    text = missing_rules(
        [
            Permission("get", "ray.io", "rayservices", "chat"),
            Permission("list", "ray.io", "rayservices", "chat"),
            Permission("list", "", "nodes"),
        ]
    )
    assert "kind: Role\n" in text
    assert "kind: ClusterRole\n" in text
    assert "- apiGroups: [ray.io]\n  resources: [rayservices]\n  verbs: [get, list]" in text


@pytest.mark.parametrize(
    ("text", "number"), [("500m", 0.5), ("16Gi", 16 * 1024**3), ("4", 4), ("1e3", 1000), (2, 2)]
)
def test_quantities_are_numbers(text: str, number: float) -> None:
    assert parse_quantity(text) == number


def test_what_is_no_quantity_is_refused() -> None:
    with pytest.raises(ValueError, match="no quantity"):
        parse_quantity("many")


def test_amounts_read_well() -> None:
    assert render_amount("memory", 16 * 1024**3) == "16.0 GiB of memory"
    assert render_amount("cpu", 0.5) == "0.5 CPUs"
