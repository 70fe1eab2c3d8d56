"""Differences of renderings and the story that follows, without a cluster."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from cluster.rollout.changes import Changes, compare, group_patches, ray_service
from cluster.rollout.story import Situation, Story, tell
from tests.rollout.rendering import BOX, DEMO, render

Object = dict[str, Any]
_CALM = Situation()


def story_of(
    old: Object, new: Object, situation: Situation = _CALM, *, recreate: bool = False
) -> Story:
    before, after = render(old), render(new)
    return tell(compare(before, after), ray_service(after), situation, recreate=recreate)


def test_equal_renderings_do_not_differ() -> None:
    assert compare(render(DEMO), render(DEMO)) == Changes()
    assert story_of(DEMO, DEMO).way == "nothing"


def test_new_chart_version_alone_changes_nothing() -> None:
    new = render(DEMO)
    for found in new:
        found["metadata"]["labels"]["helm.sh/chart"] = "shoal-9.9.9"
        found["metadata"]["labels"]["app.kubernetes.io/version"] = "9.9.9"
    assert compare(render(DEMO), new) == Changes()


def test_changed_arguments_restart_their_applications() -> None:
    new = {**DEMO, "model": {"preset": "demo", "overrides": {"max_answer_tokens": 99}}}
    changes = compare(render(DEMO), render(new))
    assert changes.restarted == ("model-shoal-demo", "shoal")
    assert (changes.template, changes.adjusted) == ((), ())


def test_changed_counts_restart_nothing_and_name_their_group() -> None:
    changes = compare(render(DEMO), render(DEMO, replicas={"min": 2, "max": 3}))
    assert changes.adjusted == ("model-shoal-demo",)
    assert changes.groups == ("engine",)
    assert (changes.restarted, changes.template) == ((), ())


def test_tolerations_are_no_change_of_the_template() -> None:
    pod = {"pod": {"tolerations": [{"key": "gpu", "operator": "Exists"}]}}
    new = {**DEMO, "hardware": {"preset": "cpu", "overrides": pod}}
    changes = compare(render(DEMO), render(new))
    assert (changes.groups, changes.template) == (("engine",), ())


def test_changed_image_is_named_with_old_and_new() -> None:
    changes = compare(render(DEMO), render(DEMO, image={"tag": "2"}))
    assert any(
        line.startswith("headGroupSpec.template.spec.containers[head].image: example.org/shoal:")
        and line.endswith(" -> example.org/shoal:2")
        for line in changes.template
    )


def test_new_http_options_need_new_pods() -> None:
    old, new = render(DEMO), render(DEMO)
    service = ray_service(new)
    service["spec"]["serveConfigV2"] = service["spec"]["serveConfigV2"].replace("8000", "8001")
    assert "http_options" in " ".join(compare(old, new).template)


def test_groups_added_at_the_end_are_no_new_cluster() -> None:
    old, new = render(DEMO), render(DEMO)
    groups = ray_service(new)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    groups.append({**copy.deepcopy(groups[0]), "groupName": "more"})
    changes = compare(old, new)
    assert (changes.template, changes.groups) == ((), ("more",))


def test_bounds_and_tolerations_become_guarded_patches() -> None:
    old = ray_service(render(DEMO))["spec"]["rayClusterConfig"]
    new = ray_service(render(DEMO, replicas={"min": 2, "max": 2}))["spec"]["rayClusterConfig"]
    new["workerGroupSpecs"][0]["template"]["spec"]["tolerations"] = [{"operator": "Exists"}]
    path = "/spec/workerGroupSpecs/0"
    assert group_patches(old, new) == [
        {"op": "test", "path": f"{path}/groupName", "value": "engine"},
        {"op": "add", "path": f"{path}/minReplicas", "value": 2},
        {"op": "add", "path": f"{path}/replicas", "value": 2},
        {
            "op": "add",
            "path": f"{path}/template/spec/tolerations",
            "value": [{"operator": "Exists"}],
        },
    ]
    assert group_patches(new, new) == []


def test_autoscaled_replicas_are_left_alone() -> None:
    live = ray_service(render(DEMO))["spec"]["rayClusterConfig"]
    live["workerGroupSpecs"][0]["replicas"] = 5
    assert group_patches(live, ray_service(render(DEMO))["spec"]["rayClusterConfig"]) == []


def test_without_a_spare_gpu_the_gap_is_told() -> None:
    new = {**BOX, "model": {"preset": BOX["model"]["preset"], "overrides": {"yarn": False}}}
    story = story_of(BOX, new)
    assert story.way == "in place"
    assert "the old one ends first" in " ".join(story.lines)


def test_with_upgrade_none_pods_change_by_recreate_only() -> None:
    new = {**BOX, "image": {"tag": "2"}}
    assert "KubeRay would store and not do" in story_of(BOX, new).refusal
    story = story_of(BOX, new, recreate=True)
    assert (story.way, story.refusal) == ("recreate", "")
    assert "nobody is served" in " ".join(story.lines)


@pytest.mark.parametrize(
    ("kind", "way"), [("NewCluster", "new cluster"), ("Incremental", "incremental")]
)
def test_second_cluster_tells_its_gpus_and_how_long(kind: str, way: str) -> None:
    upgrade = {"type": kind, "incremental": {"gatewayClassName": "g"}}
    old, new = {**BOX, "upgrade": upgrade}, {**BOX, "upgrade": upgrade, "image": {"tag": "2"}}
    story = story_of(old, new, Situation(num_gpus=4))
    assert (story.way, story.refusal) == (way, "")
    assert "60 s longer, it holds 8 GPUs in the place of 4" in " ".join(story.lines)


def test_second_cluster_without_room_is_refused() -> None:
    old = {**BOX, "upgrade": {"type": "NewCluster"}}
    new = {**old, "image": {"tag": "2"}}
    story = story_of(old, new, Situation(num_gpus=4, spare="box: 0 nvidia.com/gpu free"))
    assert "box: 0 nvidia.com/gpu free" in story.refusal
    assert "--recreate" in story.hint


def test_parked_changes_count_as_changes() -> None:
    story = story_of(BOX, BOX, Situation(parked=("image: a -> b",)))
    assert "store and not do" in story.refusal
    assert "  image: a -> b" in story.lines


def test_running_upgrade_is_not_disturbed_but_by_recreate() -> None:
    situation = Situation(upgrading="shoal-abcde", is_stalled=True)
    new = {**BOX, "image": {"tag": "2"}}
    assert "shoal-abcde comes up and finds no room" in story_of(BOX, new, situation).refusal
    assert story_of(BOX, new, situation, recreate=True).refusal == ""


def test_suspending_and_resuming_are_told() -> None:
    assert story_of(DEMO, {**DEMO, "suspend": True}).way == "suspend"
    resumed = story_of({**DEMO, "suspend": True}, DEMO, Situation(is_suspended=True))
    assert resumed.way == "recreate"
    assert "suspended already" in " ".join(resumed.lines)
