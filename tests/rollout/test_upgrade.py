"""The ways of a change on a real API server: in place, beside, recreated; and back again."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.control_plane import Api, ApiServer
from tests.rollout.conftest import DEMO, Ended, Shoal
from tests.rollout.scripted_operator import Script, ScriptedOperator

pytestmark = pytest.mark.apiserver

# So long something takes that a command has to see, which looks about as often as there are ticks.
SEEN_TICKS = 20


@pytest.fixture
def deployed(shoal: Shoal, kubernetes: str, operator: ScriptedOperator) -> str:
    """A Shoal that is ready, with upgrade None."""
    ended = shoal(f"deploy {DEMO} -n {kubernetes}")
    assert ended.code == 0, ended.err
    return kubernetes


@pytest.fixture
def api(api_server: ApiServer) -> Api:
    return api_server.api


def clusters(api: Api, namespace: str) -> list[dict[str, Any]]:
    return api.list("ray.io/v1", "RayCluster", namespace)


def cluster_name(api: Api, namespace: str) -> str:
    [cluster] = clusters(api, namespace)
    return str(cluster["metadata"]["name"])


def test_what_is_refused_or_needless_leaves_everything_as_it_was(
    shoal: Shoal, deployed: str, api: Api
) -> None:
    service = api.get("ray.io/v1", "RayService", "shoal", deployed)
    same = shoal(f"upgrade -n {deployed}")
    assert (same.code, same.out.strip()) == (0, "Nothing differs: nothing to do.")
    parked = shoal(f"upgrade -n {deployed} --set image.tag=other --yes")
    assert parked.code == 1
    assert "image: example.org/shoal:" in parked.out
    assert "--recreate" in parked.err
    roomless = shoal(
        f"upgrade -n {deployed} --yes --set upgrade.type=NewCluster"
        " --set hardware.overrides.pod.cpu='\"31\"'"
    )
    assert roomless.code == 1
    assert "a second cluster has no room: no room for 1 engine pod of 31 CPUs" in roomless.err
    unknown = shoal(f"rollback 9 -n {deployed}")
    assert (unknown.code, "there is no earlier revision 9" in unknown.err) == (2, True)
    assert api.get("ray.io/v1", "RayService", "shoal", deployed)["spec"] == service["spec"]
    assert len(clusters(api, deployed)) == 1


def test_config_changes_in_place_name_what_restarts_and_roll_back_alike(
    shoal: Shoal, deployed: str, api: Api, script: Script
) -> None:
    before = cluster_name(api, deployed)
    script.deploying_ticks = SEEN_TICKS
    changed = shoal(f"upgrade -n {deployed} --set model.overrides.max_answer_tokens=99 --yes")
    assert changed.code == 0, changed.err
    assert "In place: Serve replaces the copies of model-shoal-demo, shoal" in changed.out
    assert "model-shoal-demo: deploying" in changed.out
    assert cluster_name(api, deployed) == before
    ended = shoal(f"rollback -n {deployed} --yes")
    assert ended.code == 0, ended.err
    assert "Back from revision 2 to 1." in ended.out
    assert cluster_name(api, deployed) == before
    service = api.get("ray.io/v1", "RayService", "shoal", deployed)
    assert "max_answer_tokens: 99" not in service["spec"]["serveConfigV2"]


def test_counts_change_without_a_restart_and_bounds_reach_the_running_cluster(
    shoal: Shoal, deployed: str, api: Api
) -> None:
    before = cluster_name(api, deployed)
    ended = shoal(f"upgrade -n {deployed} --set replicas.min=2 --set replicas.max=3 --yes")
    assert ended.code == 0, ended.err
    assert "In place, without a restart: model-shoal-demo" in ended.out
    assert "written to the running cluster" in ended.out
    [cluster] = clusters(api, deployed)
    assert cluster["metadata"]["name"] == before
    assert cluster["spec"]["workerGroupSpecs"][0]["minReplicas"] == 2


def test_recreate_waits_for_the_pods_then_starts_with_the_new_image(
    shoal: Shoal, deployed: str, api: Api
) -> None:
    before = cluster_name(api, deployed)
    ended = shoal(f"upgrade -n {deployed} --set image.tag=other --recreate --yes")
    assert ended.code == 0, ended.err
    told = ended.out
    assert "nobody is served" in told
    assert told.index("pods: all gone") < told.index("service: ready on cluster")
    [cluster] = clusters(api, deployed)
    assert cluster["metadata"]["name"] != before
    image = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
    assert image == "example.org/shoal:other"
    pods = api.list("v1", "Pod", deployed)
    assert {pod["metadata"]["labels"]["ray.io/cluster"] for pod in pods} == {
        cluster["metadata"]["name"]
    }


def test_new_cluster_comes_up_beside_and_takes_over(
    shoal: Shoal, deployed: str, api: Api, script: Script
) -> None:
    before = cluster_name(api, deployed)
    script.deploying_ticks = SEEN_TICKS
    ended = shoal(
        f"upgrade -n {deployed} --set upgrade.type=NewCluster --set image.tag=other --yes"
    )
    assert ended.code == 0, ended.err
    assert "A second cluster comes up beside this one" in ended.out
    assert "60 s longer" in ended.out
    assert f"comes up beside {before}" in ended.out
    assert cluster_name(api, deployed) != before


def test_stalled_second_cluster_is_named_and_ended_by_recreate(
    shoal: Shoal, deployed: str, api: Api, script: Script
) -> None:
    script.has_room = False
    stalled = shoal(
        f"upgrade -n {deployed} --set upgrade.type=NewCluster --set image.tag=other --yes"
        " --timeout 8"
    )
    assert stalled.code == 1
    assert "no node takes the" in stalled.err
    again = shoal(f"upgrade -n {deployed} --set image.tag=third --yes")
    assert again.code == 1
    assert "an upgrade is under way" in again.err
    assert "finds no room" in again.err
    script.has_room = True
    ended = shoal(f"upgrade -n {deployed} --recreate --yes")
    assert ended.code == 0, ended.err
    assert len(clusters(api, deployed)) == 1


def test_parked_change_is_found_and_applied_by_recreate(
    shoal: Shoal, deployed: str, api: Api
) -> None:
    service = api.get("ray.io/v1", "RayService", "shoal", deployed)
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0][
        "image"
    ] = "example.org/shoal:parked"
    api.merge(service, {"spec": service["spec"]})
    ended = shoal(f"upgrade -n {deployed} --yes")
    assert ended.code == 1
    assert "example.org/shoal:parked" in ended.out
    assert "--recreate" in ended.err


def test_rollback_of_a_recreation_steps_over_the_suspended_revision(
    shoal: Shoal, deployed: str, api: Api
) -> None:
    changed = shoal(f"upgrade -n {deployed} --set image.tag=other --recreate --yes")
    assert changed.code == 0, changed.err
    refused = shoal(f"rollback -n {deployed} --yes")
    assert (refused.code, "--recreate" in refused.err) == (1, True)
    ended = shoal(f"rollback -n {deployed} --recreate --yes")
    assert ended.code == 0, ended.err
    assert "Back from revision 3 to 1." in ended.out
    [cluster] = clusters(api, deployed)
    image = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
    assert image.endswith("-cpu")


def test_suspend_ends_every_pod_and_resume_starts_again(
    shoal: Shoal, deployed: str, api: Api
) -> None:
    ended = shoal(f"upgrade -n {deployed} --set suspend=true --yes")
    assert ended.code == 0, ended.err
    assert api.list("v1", "Pod", deployed) == []
    assert "suspended" in shoal(f"status -n {deployed}").out
    resumed = shoal(f"upgrade -n {deployed} --set suspend=false --yes")
    assert resumed.code == 0, resumed.err
    assert len(clusters(api, deployed)) == 1


def test_ctrl_c_stops_following_and_says_how_to_go_on(
    shoal: Shoal, kubernetes: str, operator: ScriptedOperator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as pressed:
        pressed.setattr("cluster.local.interrupts.Interrupts.wait", lambda *_: True)
        left = shoal(f"deploy {DEMO} -n {kubernetes}")
    assert (left.code, "the cluster goes on" in left.err) == (130, True)
    assert shoal(f"status -n {kubernetes} --name shoal --follow").code == 0
    with monkeypatch.context() as pressed:
        pressed.setattr("cluster.local.interrupts.Interrupts.wait", lambda *_: True)
        left = shoal(f"upgrade -n {kubernetes} --recreate --yes")
    assert (left.code, "it stays suspended" in left.err) == (130, True)
    ended = shoal(f"upgrade -n {kubernetes} --recreate --yes")
    assert ended.code == 0, ended.err


def test_undeploy_waits_for_the_operator_and_leaves_nothing(
    shoal: Shoal, deployed: str, api: Api
) -> None:
    ended: Ended = shoal(f"undeploy -n {deployed} --yes")
    assert ended.code == 0, ended.err
    assert "Removed; no pod is left." in ended.out
    assert api.list("ray.io/v1", "RayService", deployed) == []
    assert api.list("v1", "Pod", deployed) == []


def test_undeploy_says_when_no_operator_is_left_to_finish(
    shoal: Shoal, deployed: str, api: Api, script: Script
) -> None:
    script.is_alive = False
    for pod in api.list("v1", "Pod", deployed):
        api.delete(pod)
    ended = shoal(f"undeploy -n {deployed} --yes --timeout 1")
    assert ended.code == 1
    assert "still has its finalizer" in ended.err
    assert "kubectl patch rayservice shoal" in ended.err
    script.is_alive = True


@pytest.mark.parametrize("command", ["upgrade", "rollback", "undeploy"])
def test_commands_on_no_release_say_so(shoal: Shoal, kubernetes: str, command: str) -> None:
    ended = shoal(f"{command} -n {kubernetes}")
    assert ended.code == 4
    assert "no release named 'shoal'" in ended.err
