"""What must hold of every rendering, whatever the values (most of these were somebody's outage)."""

from __future__ import annotations

import re
from typing import Any

import pytest
from typer.main import get_command

from cluster.cli import app
from tests.chart.cases import CASES, FEATURES, FITS, SMALL, UPGRADES, Case, served
from tests.chart.rendering import RELEASE, find, pod_specs, render, render_texts, serve_config

GIB = {"Mi": 1 / 1024, "Gi": 1.0}


def gib(quantity: str) -> float:
    number, unit = re.fullmatch(r"([0-9]+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return float(number) * GIB[unit]


def cluster_of(case: Case) -> dict[str, Any]:
    cluster: dict[str, Any] = find(case.values, "RayService")["spec"]["rayClusterConfig"]
    return cluster


def engine_of(case: Case) -> dict[str, Any]:
    (engine,) = pod_specs(case.values)["engine"]["spec"]["containers"]
    found: dict[str, Any] = engine
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_replica_takes_exactly_the_gpus_of_one_pod(case: Case) -> None:
    (group,) = cluster_of(case)["workerGroupSpecs"]
    gpus = engine_of(case)["resources"]["limits"].get("nvidia.com/gpu", "0")
    assert isinstance(gpus, str)
    assert group["rayStartParams"].get("num-gpus", "0") == gpus
    assert group["numOfHosts"] == 1
    for application in serve_config(case)["applications"][:-1]:
        (deployment,) = application["deployments"]
        bundles = deployment["placement_group_bundles"]
        assert len(bundles) == application["args"]["model"]["tensor_parallel"]
        assert sum(bundle.get("GPU", 0) for bundle in bundles) == int(gpus)
        num_cpus = int(group["rayStartParams"]["num-cpus"])
        needed = sum(bundle["CPU"] for bundle in bundles)
        assert needed < num_cpus < 2 * needed


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shared_memory_is_part_of_the_pods_memory(case: Case) -> None:
    spec = pod_specs(case.values)["engine"]["spec"]
    (shm,) = [volume for volume in spec["volumes"] if volume["name"] == "shm"]
    assert shm["emptyDir"]["medium"] == "Memory"
    memory = engine_of(case)["resources"]["limits"]["memory"]
    assert 0 < gib(shm["emptyDir"]["sizeLimit"]) < gib(memory)
    assert {"name": "shm", "mountPath": "/dev/shm"} in engine_of(case)["volumeMounts"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pods_outlive_the_longest_stream(case: Case) -> None:
    spec = pod_specs(case.values)["engine"]["spec"]
    env = {item["name"]: item.get("value") for item in engine_of(case)["env"]}
    hard_stop = int(env["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"])
    longest = max(
        deployment["graceful_shutdown_timeout_s"]
        for application in serve_config(case)["applications"]
        for deployment in application["deployments"]
    )
    assert longest < hard_stop < spec["terminationGracePeriodSeconds"]
    assert engine_of(case)["lifecycle"]["preStop"]["exec"]["command"][0] == "python"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_labels_of_pods_stay_the_same_and_leave_kuberays_alone(case: Case) -> None:
    own = {"app.kubernetes.io/instance", "app.kubernetes.io/part-of"}
    for name in ("head", "engine"):
        metadata = pod_specs(case.values)[name]["metadata"]
        assert set(metadata["labels"]) - own == set(case.values.get("podLabels", {}))
        assert metadata.get("annotations", {}) == case.values.get("podAnnotations", {})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_the_head_gets_a_token_of_the_api_server(case: Case) -> None:
    mounts = {
        name: pod["spec"]["automountServiceAccountToken"]
        for name, pod in pod_specs(case.values).items()
    }
    assert mounts.pop("head") == cluster_of(case)["enableInTreeAutoscaling"]
    assert not any(mounts.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ray_asks_for_a_token_and_keeps_work_off_the_head(case: Case) -> None:
    spec = find(case.values, "RayService")["spec"]
    assert spec["excludeHeadPodFromServeSvc"] is True
    cluster = cluster_of(case)
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_ports_of_the_head_are_those_that_kuberay_looks_for(case: Case) -> None:
    """By name: without `serve` it cannot make its Service and a RayService never becomes ready."""
    (head,) = pod_specs(case.values)["head"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    assert ports == {"gcs-server": 6379, "dashboard": 8265, "metrics": 8080, "serve": 8000}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_secret_and_no_shell_is_rendered(case: Case) -> None:
    assert "Secret" not in {item["kind"] for item in render(case.values)}
    for pod in pod_specs(case.values).values():
        for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
            assert not {"sh", "bash", "/bin/sh", "/bin/bash"} & set(container.get("command", []))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_running_cluster_leaves_room_for_more_copies(case: Case) -> None:
    """New bounds never reach a running RayCluster: those of today must not be tomorrow's limit."""
    (group,) = cluster_of(case)["workerGroupSpecs"]
    assert 1 <= group["minReplicas"] == group["replicas"]
    assert group["maxReplicas"] == 256


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_groups_have_an_idle_time_only_beside_the_autoscaler(case: Case) -> None:
    """KubeRay refuses a whole RayService whose group has one without the autoscaler."""
    (group,) = cluster_of(case)["workerGroupSpecs"]
    assert ("idleTimeoutSeconds" in group) == cluster_of(case)["enableInTreeAutoscaling"]


@pytest.mark.parametrize("upgrade", UPGRADES)
def test_upgrade_type_is_one_that_kuberay_knows(upgrade: str) -> None:
    values = served("demo", "cpu", upgrade=UPGRADES[upgrade])
    strategy = find(values, "RayService")["spec"]["upgradeStrategy"]
    names = {"Incremental": "NewClusterWithIncrementalUpgrade"}
    assert strategy["type"] == names.get(upgrade, upgrade)
    assert ("clusterUpgradeOptions" in strategy) == (upgrade == "Incremental")


@pytest.mark.parametrize("hardware", ["a100-80gb", "rtx4090d-x4"])
def test_nothing_waits_for_a_spare_gpu_unless_told_to(hardware: str) -> None:
    spec = find(served("qwen2.5-7b-instruct", hardware), "RayService")["spec"]
    assert spec["upgradeStrategy"]["type"] == "None"


def test_both_presets_of_the_gallery_serve_131072_tokens() -> None:
    for hardware, size in (("a100-80gb", 1), ("rtx4090d-x4", 4)):
        (model, _) = serve_config(Case("", served("qwen2.5-7b-instruct", hardware)))["applications"]
        arguments = model["args"]["model"]
        assert (arguments["max_model_len"], arguments["yarn"]) == (131072, True)
        assert arguments["tensor_parallel"] == size
    assert FITS["qwen2.5-7b-instruct"]["rtx4090d-x4"]["chosen"] == "4"


def test_peers_without_peer_to_peer_access_are_told_to_nccl() -> None:
    case = Case("", served("qwen2.5-7b-instruct", "rtx4090d-x4"))
    assert {"name": "NCCL_P2P_DISABLE", "value": "1"} in engine_of(case)["env"]


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_service_finds_exactly_the_pods_that_serve(case: Case) -> None:
    """KubeRay adds `ray.io/group` and, to workers of a RayService, `ray.io/serve`."""
    selector = find(case.values, "Service")["spec"]["selector"]
    own = pod_specs(case.values)["engine"]["metadata"]["labels"]
    added = {"ray.io/group": "engine", "ray.io/serve": "true"}
    assert selector.items() <= (own | added).items()
    assert added.items() <= selector.items()
    (port,) = find(case.values, "Service")["spec"]["ports"]
    assert port["targetPort"] == 8000


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_trial_goes_where_the_head_goes(case: Case) -> None:
    """A pod without a model needs no GPU node, and may find every other one tainted."""
    pods = pod_specs(case.values)
    trials = [pod["spec"] for name, pod in pods.items() if name not in ("head", "engine")]
    assert len(trials) == case.values.get("tests", {}).get("enabled", True)
    for key in ("nodeSelector", "tolerations"):
        assert all(trial.get(key) == pods["head"]["spec"].get(key) for trial in trials)


def test_disruption_budget_is_a_number_and_leaves_the_head_free() -> None:
    spec = find(SMALL, "PodDisruptionBudget")["spec"]
    assert spec["minAvailable"] == 1
    assert "maxUnavailable" not in spec
    assert spec["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    assert spec["selector"]["matchLabels"]["ray.io/group"] == "engine"


def test_operator_reaches_the_head_through_the_network_policy() -> None:
    spec = find(SMALL, "NetworkPolicy")["spec"]
    (rule,) = [
        rule
        for rule in spec["ingress"]
        if {"protocol": "TCP", "port": 8265} in rule.get("ports", [])
    ]
    (peer,) = rule["from"]
    assert peer["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": "kuberay-system"
    }
    assert spec["policyTypes"] == ["Ingress"]


def test_weights_survive_an_uninstall() -> None:
    claim = find(SMALL, "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert claim["spec"]["resources"]["requests"]["storage"] == "3Gi"


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_notes_name_the_next_command(case: Case) -> None:
    (notes,) = [
        text for path, text in render_texts(case.values).items() if path.endswith("NOTES.txt")
    ]
    name = case.values.get("fullnameOverride", RELEASE)
    assert f"shoal status --namespace models --name {name} --follow" in notes
    has_keys = bool(case.values["auth"]["apiKeys"]["existingSecret"])
    assert ("shoal keys create NAME --secret shoal-keys --namespace models" in notes) == has_keys
    assert not re.search(r"<no value>|%!|map\[", notes)


def test_commands_of_the_notes_are_understood_by_shoal() -> None:
    notes = render_texts(SMALL)["shoal/templates/NOTES.txt"]
    commands = [line.split()[1:] for line in notes.splitlines() if line.startswith("     shoal ")]
    assert [words[0] for words in commands] == ["status", "keys"]
    for words in commands:
        parse(get_command(app), words)


def parse(command: Any, words: list[str]) -> None:
    """Read a command line without running it; fails on words that the command does not take."""
    if hasattr(command, "commands"):
        parse(command.commands[words[0]], words[1:])
    else:
        command.make_context("shoal", words)


def test_same_values_render_to_the_same_text() -> None:
    from tests.chart.rendering import CHART, NAMESPACE, load_chart

    again = load_chart(CHART).render(SMALL, name=RELEASE, namespace=NAMESPACE)
    assert {path: text for path, text in again.items() if text.strip()} == render_texts(SMALL)
