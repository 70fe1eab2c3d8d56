"""`shoal deploy`, `status` and `manifests` on a real API server with the scripted operator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cluster.permissions import ROLE
from scripts.control_plane import ApiServer
from tests.rollout.conftest import DEMO, Shoal
from tests.rollout.scripted_operator import Script, ScriptedOperator

pytestmark = pytest.mark.apiserver


def test_deploy_ends_with_the_address_and_status_knows_it(
    shoal: Shoal, kubernetes: str, operator: ScriptedOperator
) -> None:
    ended = shoal(f"deploy {DEMO} -n {kubernetes}")
    assert ended.code == 0, ended.err
    assert "API and page    http://127.0.0.1:8080" in ended.out
    forward = f"kubectl --context shoal -n {kubernetes} port-forward service/shoal 8080:8080"
    assert forward in ended.out
    assert f"-n {kubernetes} get secret shoal-ray-token" in ended.out
    assert "model-shoal-demo: running" in ended.out
    again = shoal(f"deploy {DEMO} -n {kubernetes}")
    assert (again.code, "shoal upgrade" in again.err) == (3, True)
    shown = shoal(f"status -n {kubernetes}")
    assert "shoal: ready, for" in shown.out
    assert forward in shown.out
    [report] = json.loads(shoal(f"status -n {kubernetes} --json").out)
    assert (report["phase"], report["models"]) == ("ready", ["shoal-demo"])
    followed = shoal(f"status -n {kubernetes} --name shoal --follow")
    assert followed.code == 0, followed.err


def test_dry_run_checks_everything_and_makes_nothing(
    shoal: Shoal, kubernetes: str, api_server: ApiServer
) -> None:
    ended = shoal(f"deploy {DEMO} -n {kubernetes} --dry-run")
    assert ended.code == 0, ended.err
    assert "Nothing was changed." in ended.out
    assert api_server.api.list("ray.io/v1", "RayService", kubernetes) == []
    assert shoal(f"upgrade -n {kubernetes}").code == 4


def test_no_wait_installs_and_says_where_it_will_be(shoal: Shoal, kubernetes: str) -> None:
    ended = shoal(f"deploy {DEMO} -n {kubernetes} --no-wait")
    assert ended.code == 0, ended.err
    assert "the cluster goes on" in ended.out
    assert "starting, not ready" in shoal(f"status -n {kubernetes}").out


def test_every_lack_is_named_at_once_and_nothing_is_made(
    shoal: Shoal, kubernetes: str, api_server: ApiServer
) -> None:
    ended = shoal(
        f"deploy -n {kubernetes} --model qwen2.5-7b-instruct --hardware rtx4090d-x4"
        " --set auth.apiKeys.existingSecret=absent --set auth.hfToken.existingSecret=hub"
        " --set security.operatorNamespace=elsewhere --set weights.pvc.storageClass=no-such"
        " --set scheduling.priorityClassName=no-such"
    )
    assert ended.code == 1
    for key in (
        "auth.apiKeys.existingSecret: there is no Secret 'absent'",
        "auth.hfToken.existingSecret: there is no Secret 'hub'",
        "security.operatorNamespace: is elsewhere, but KubeRay runs in kuberay-system",
        "weights.pvc.storageClass: there is no StorageClass 'no-such'",
        "scheduling.priorityClassName: there is no PriorityClass 'no-such'",
        "hardware.preset: no room for 1 engine pod of 16 CPUs, 64.0 GiB of memory, 4 nvidia.com",
    ):
        assert key in ended.err
    assert api_server.api.list("ray.io/v1", "RayService", kubernetes) == []


def test_unknown_namespace_is_named(shoal: Shoal, kubernetes: str) -> None:
    ended = shoal(f"deploy {DEMO} -n nowhere")
    assert ended.code == 1
    assert "kubectl create namespace nowhere" in ended.err


def test_user_without_rights_gets_the_role_that_grants_them(
    shoal: Shoal, kubernetes: str, api_server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = api_server.write_kubeconfig(f"dev-{kubernetes}", namespace=kubernetes)
    monkeypatch.setenv("KUBECONFIG", str(config))
    refused = shoal(f"deploy {DEMO} --no-wait")
    assert refused.code == 1
    assert "permissions: you may not" in refused.err
    text = refused.err[refused.err.index("    apiVersion: rbac") :]
    indented = [line for line in text.splitlines() if line.startswith("    ")]
    role = yaml.safe_load("\n".join(line[4:] for line in indented))
    assert role["metadata"] == {"name": ROLE, "namespace": kubernetes}
    api_server.grant(f"dev-{kubernetes}", kubernetes, role["rules"])
    granted = shoal(f"deploy {DEMO} --no-wait")
    assert granted.code == 0, granted.err
    assert "warning: permissions: not checked, because you may not" in granted.out
    assert "list nodes" in granted.out
    status = shoal(f"status -n {kubernetes}")
    assert status.code == 0, status.err


def test_refused_pod_is_the_root_cause(
    shoal: Shoal,
    kubernetes: str,
    operator: ScriptedOperator,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.rollout.causes._SHORT_S", 0.1)
    script.refusal = 'pods "x" is forbidden: exceeded quota: small, requested: cpu=4'
    ended = shoal(f"deploy {DEMO} -n {kubernetes}")
    assert ended.code == 1
    assert "quota has no room for the engine pod: small, requested: cpu=4" in ended.err
    assert f"status --context shoal --namespace {kubernetes} --name shoal --follow" in ended.err


def test_failed_application_is_the_root_cause(
    shoal: Shoal,
    kubernetes: str,
    operator: ScriptedOperator,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.rollout.causes._SHORT_S", 0.1)
    script.failures["model-shoal-demo"] = "Traceback (most recent call last):\nMemoryError: no room"
    ended = shoal(f"deploy {DEMO} -n {kubernetes}")
    assert ended.code == 1
    assert "Serve could not start model-shoal-demo: MemoryError: no room" in ended.err


def test_manifests_are_accepted_by_the_server_as_they_are(
    shoal: Shoal, kubernetes: str, api_server: ApiServer
) -> None:
    ended = shoal(f"manifests {DEMO} -n {kubernetes}")
    assert ended.code == 0, ended.err
    assert "kubectl apply --server-side" in ended.out
    for found in yaml.safe_load_all(ended.out):
        api_server.api.apply(found)
    assert api_server.api.get("ray.io/v1", "RayService", "shoal", kubernetes)["spec"]
    serve = shoal(f"manifests {DEMO} --serve")
    names = [entry["name"] for entry in yaml.safe_load(serve.out)["applications"]]
    assert names == ["model-shoal-demo", "shoal"]
    gpus = shoal("manifests --hardware a100-80gb --set auth.allowAnonymous=true")
    assert "nvidia.com/gpu" in gpus.out


def test_configuration_file_becomes_values(shoal: Shoal, tmp_path: Path) -> None:
    config = tmp_path / "chat.yaml"
    config.write_text(
        "hardware: a100-80gb\n"
        "models: [{preset: qwen2.5-7b-instruct, max_answer_tokens: 77}]\n"
        "http: {allow_anonymous: true}\n"
    )
    values = tmp_path / "values.yaml"
    values.write_text("hardware: {preset: rtx4090d-x4}\nlogLevel: debug\n")
    ended = shoal(f"manifests {config} --values {values} --set logLevel=error")
    assert ended.code == 0, ended.err
    assert "max_answer_tokens: 77" in ended.out
    assert "NCCL_P2P_DISABLE" in ended.out
    assert "log_level: error" in ended.out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("manifests --set nonsense", "must be KEY=VALUE"),
        ("manifests --set models[0].preset=demo", "--values FILE"),
        ("manifests --values no-such.yaml", "no-such.yaml: cannot be read"),
        ("manifests --set 'a={'", "not a YAML value"),
        ("manifests --model no-such --set auth.allowAnonymous=true", "model.preset"),
        ("status --follow", "--follow"),
    ],
)
def test_unusable_command_lines_name_the_option(shoal: Shoal, command: str, words: str) -> None:
    ended = shoal(command)
    assert ended.code == 2
    assert words in ended.err


def test_key_that_a_cluster_cannot_use_is_named(shoal: Shoal, tmp_path: Path) -> None:
    config = tmp_path / "chat.yaml"
    config.write_text("models: [{preset: demo, path: /here}]\n")
    ended = shoal(f"manifests {config}")
    assert ended.code == 2
    assert "models[0].path: is of this machine" in ended.err
