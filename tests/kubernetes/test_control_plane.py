"""What the other tests rely on: the server refuses what a real cluster refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from scripts.control_plane import ApiServer, RefusedError

ROOT = Path(__file__).parents[2]
KILLED = """
import sys, time
from pathlib import Path
from scripts.control_plane.processes import Program
program = Program(["sleep", "600"], log=Path(sys.argv[1]) / "sleep.log")
print(program.pid, flush=True)
time.sleep(600)
"""


def pod(namespace: str, **container: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "probe", "namespace": namespace},
        "spec": {"containers": [{"name": "probe", "image": "example.org/probe", **container}]},
    }


@pytest.mark.apiserver
def test_server_says_which_version_of_kubernetes_it_is(api_server: ApiServer) -> None:
    assert api_server.api.request("GET", "/version")["gitVersion"] == "v1.36.0"


@pytest.mark.apiserver
def test_misspelt_field_of_a_ray_service_is_refused_and_named(
    api_server: ApiServer, namespace: str
) -> None:
    service = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "probe", "namespace": namespace},
        "spec": {"serveConfigV2": "", "rayClusterConfigs": {}},
    }

    with pytest.raises(RefusedError, match="rayClusterConfigs"):
        api_server.api.create(service)


@pytest.mark.apiserver
def test_pod_that_may_escalate_is_refused(api_server: ApiServer, namespace: str) -> None:
    with pytest.raises(RefusedError, match='violates PodSecurity "restricted') as refused:
        api_server.api.create(pod(namespace))

    assert refused.value.status == 403


@pytest.mark.apiserver
def test_user_may_do_only_what_a_binding_says(api_server: ApiServer, namespace: str) -> None:
    rules = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]
    api_server.grant("reader", namespace, rules)
    reader = api_server.api_of("reader")

    assert reader.list("v1", "Pod", namespace) == []
    with pytest.raises(RefusedError, match='User "reader" cannot list resource "secrets"'):
        reader.list("v1", "Secret", namespace)
    with pytest.raises(RefusedError, match='in the namespace "default"'):
        reader.list("v1", "Pod", "default")
    reader.close()


def test_programs_end_with_a_killed_test_run(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert run.stdout is not None
    program = psutil.Process(int(run.stdout.readline()))

    os.kill(run.pid, signal.SIGKILL)
    run.communicate()

    _, alive = psutil.wait_procs([program], timeout=60)
    # Where nobody collects orphans, what is left of it is its status.
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)
