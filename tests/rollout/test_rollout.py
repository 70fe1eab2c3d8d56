"""The state machines of a rollout under a simulated clock: lines, verdicts, root causes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from cluster.rollout.addresses import addresses_of
from cluster.rollout.causes import causes
from cluster.rollout.machine import Ending
from cluster.rollout.report import report_of
from cluster.rollout.rollout import Goal, Rollout, describe
from cluster.rollout.situation import is_waiting_for_room, situation_of
from cluster.rollout.snapshot import Snapshot, is_pod_of
from tests.rollout.rendering import DEMO, render

Object = dict[str, Any]
CONFIG = "applications: [{name: model-a, args: {model: {name: a}}}, {name: shoal}]"


def service(*, generation: int = 1, observed: int = 1, **status: Any) -> Object:
    metadata = {
        "name": "shoal",
        "generation": generation,
        "creationTimestamp": "2026-01-01T00:00:00Z",
    }
    return {
        "metadata": metadata,
        "spec": {"serveConfigV2": CONFIG},
        "status": {"observedGeneration": observed, **status},
    }


def condition(kind: str, status: str = "True", reason: str = "R", message: str = "") -> Object:
    return {"type": kind, "status": status, "reason": reason, "message": message}


def applications(**statuses: str) -> Object:
    names = {"model": "model-a", "shoal": "shoal"}
    return {names[name]: {"status": status} for name, status in statuses.items()}


def pod(group: str = "engine", cluster: str = "shoal-abcde", **status: Any) -> Object:
    kind = "head" if group == "head" else "worker"
    labels = {"ray.io/cluster": cluster, "ray.io/node-type": kind, "ray.io/group": group}
    name = f"{cluster}-{group}-x1"
    return {"metadata": {"name": name, "labels": labels, "uid": name}, "spec": {}, "status": status}


def waiting(name: str, reason: str, message: str = "") -> Object:
    return {"name": name, "state": {"waiting": {"reason": reason, "message": message}}}


def ready_service(**changes: Any) -> Object:
    part = {
        "rayClusterName": "shoal-abcde",
        "applicationStatuses": applications(model="RUNNING", shoal="RUNNING"),
    }
    return service(activeServiceStatus=part, conditions=[condition("Ready")], **changes)


def run(snapshots: list[tuple[float, Snapshot]], goal: Goal = Goal("shoal")) -> Rollout:  # noqa: B008
    rollout = Rollout(goal, now_s=0.0)
    for now_s, snapshot in snapshots:
        rollout.observe(snapshot, now_s=now_s)
    return rollout


def test_ready_counts_only_after_it_has_stood_for_a_while() -> None:
    done = Snapshot(ready_service())
    assert run([(0, done), (5, done)]).verdict.state == "going on"
    assert run([(0, done), (5, done), (6, done)]).verdict.state == "ready"


def test_stale_status_of_an_older_specification_is_not_ready() -> None:
    stale = Snapshot(ready_service(generation=2, observed=1))
    assert run([(0, stale), (60, stale)]).verdict.state == "going on"


def test_application_that_deploys_again_starts_the_while_anew() -> None:
    done = Snapshot(ready_service())
    part = {"rayClusterName": "shoal-abcde", "applicationStatuses": applications(model="DEPLOYING")}
    busy = Snapshot(service(activeServiceStatus=part, conditions=[condition("Ready")]))
    assert run([(0, done), (4, busy), (7, done), (12, done)]).verdict.state == "going on"
    assert run([(0, done), (4, busy), (7, done), (13, done)]).verdict.state == "ready"


def test_new_cluster_is_done_when_another_one_serves() -> None:
    goal = Goal("shoal", former_cluster="shoal-abcde")
    done = Snapshot(ready_service())
    assert run([(0, done), (60, done)], goal).verdict.state == "going on"


def test_time_limit_names_the_reason_that_stands() -> None:
    unschedulable = {"type": "PodScheduled", "status": "False", "message": "0/1 nodes: no GPU"}
    stuck = Snapshot(service(), pods=(pod(conditions=[unschedulable]),))
    verdict = run([(0, stuck), (99, stuck)], Goal("shoal", limit_s=99)).verdict
    assert verdict.state == "out of time"
    assert verdict.message == "no node takes the engine pod: 0/1 nodes: no GPU"


def test_time_limit_without_any_status_asks_for_the_operator() -> None:
    quiet = Snapshot({"metadata": {"name": "shoal"}, "spec": {}})
    verdict = run([(0, quiet), (9, quiet)], Goal("shoal", limit_s=9)).verdict
    assert verdict.message == "no operator has looked at the RayService"


@pytest.mark.parametrize(
    ("container", "patience_s", "words"),
    [
        (waiting("engine", "InvalidImageName", "bad name"), 0, "bad name"),
        (waiting("engine", "ImagePullBackOff", "denied"), 45, "cannot be pulled: denied"),
        (waiting("engine", "CreateContainerConfigError", 'secret "k" not found'), 10, "not found"),
        (
            {
                "name": "download-0",
                "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                "lastState": {"terminated": {"exitCode": 1, "message": "no such repository"}},
            },
            45,
            "'download-0' ends again and again: no such repository",
        ),
        (
            {
                "name": "engine",
                "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
            },
            10,
            "more memory than its limit",
        ),
    ],
)
def test_pod_that_cannot_start_fails_after_its_patience(
    container: Object, patience_s: float, words: str
) -> None:
    stuck = Snapshot(service(), pods=(pod(containerStatuses=[container]),))
    verdict = run([(0, stuck), (patience_s, stuck)]).verdict
    assert verdict.state == "failed"
    assert words in verdict.message


def test_reason_that_may_pass_is_waited_for() -> None:
    stuck = Snapshot(service(), pods=(pod(containerStatuses=[waiting("e", "ImagePullBackOff")]),))
    assert run([(0, stuck), (44, stuck)]).verdict.state == "going on"


def test_reason_that_goes_away_is_forgiven() -> None:
    stuck = Snapshot(
        service(), pods=(pod(containerStatuses=[waiting("e", "CreateContainerError")]),)
    )
    calm = Snapshot(service(), pods=(pod(),))
    assert run([(0, stuck), (8, calm), (9, stuck), (18, stuck)]).verdict.state == "going on"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            'Failed to create worker Pod, pods "x" is forbidden: violates PodSecurity "restricted:'
            'latest": runAsNonRoot != true',
            "the namespace's pod security refuses the engine pod",
        ),
        (
            'Failed to create worker Pod, pods "x" is forbidden: exceeded quota: q, used: 9',
            "the namespace's quota has no room for the engine pod",
        ),
        (
            'Failed to create worker Pod, Pod "x" is invalid: spec.containers[0].image: Required',
            "the API server refuses the engine",
        ),
        (
            'Failed to create worker Pod, admission webhook "p" denied the request: no',
            "a policy of this cluster refuses the engine",
        ),
        (
            'Failed to create worker Pod, pods is forbidden: User "system:sa" cannot create',
            "KubeRay may not make the engine",
        ),
    ],
)
def test_warning_events_that_leave_it_initializing_are_named(message: str, words: str) -> None:
    event = {"type": "Warning", "reason": "FailedToCreateWorkerPod", "message": message}
    stuck = Snapshot(service(conditions=[condition("Ready", "False")]), events=(event,))
    verdict = run([(0, stuck), (10, stuck)]).verdict
    assert verdict.state == "failed"
    assert words in verdict.message


def test_refused_specification_is_told_in_kuberays_words() -> None:
    refused = condition("Ready", "False", "ValidationFailed", "upgradeStrategy.type is invalid")
    stuck = Snapshot(service(conditions=[refused]))
    assert "upgradeStrategy.type is invalid" in run([(0, stuck), (10, stuck)]).verdict.message


def test_failed_application_is_told_by_the_end_of_its_traceback() -> None:
    part = {
        "rayClusterName": "shoal-abcde",
        "applicationStatuses": {
            "model-a": {
                "status": "DEPLOY_FAILED",
                "message": "Traceback:\n  x\nValueError: no KV room",
            }
        },
    }
    stuck = Snapshot(service(pendingServiceStatus=part))
    verdict = run([(0, stuck), (10, stuck)]).verdict
    assert verdict.message == "Serve could not start model-a: ValueError: no KV room"


def test_one_root_cause_comes_before_what_follows_from_it() -> None:
    event = {
        "type": "Warning",
        "reason": "FailedToCreateWorkerPod",
        "message": "is forbidden: exceeded quota: q",
    }
    head = pod("head", containerStatuses=[waiting("head", "ImagePullBackOff", "denied")])
    found = causes(Snapshot(service(), pods=(head,), events=(event,)))
    assert "quota" in found[0].message
    assert len(found) == 2


def test_pods_that_end_cause_nothing() -> None:
    ending = pod(containerStatuses=[waiting("engine", "ImagePullBackOff")])
    ending["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert causes(Snapshot(service(), pods=(ending,))) == []


def test_parts_are_told_once_and_again_only_when_they_change() -> None:
    rollout = Rollout(Goal("shoal"), now_s=0.0)
    first = Snapshot(service(), pods=(pod("head", phase="Pending"),))
    assert rollout.observe(first, now_s=0.0) == [
        "service: waiting for a cluster",
        "head: waiting for a node",
    ]
    assert rollout.observe(first, now_s=1.0) == []
    placed = pod(
        "head", phase="Running", containerStatuses=[{"name": "head", "state": {"running": {}}}]
    )
    placed["spec"]["nodeName"] = "n"
    assert rollout.observe(Snapshot(service(), pods=(placed,)), now_s=2.0) == ["head: running"]


def test_pull_and_download_are_told() -> None:
    creating = pod(containerStatuses=[waiting("engine", "ContainerCreating")])
    name = creating["metadata"]["name"]
    pulling = {
        "involvedObject": {"name": name},
        "reason": "Pulling",
        "message": 'Pulling image "i:1"',
    }
    assert (
        describe(Snapshot(service(), pods=(creating,), events=(pulling,)))["engine"] == "pulls i:1"
    )
    loading = pod(initContainerStatuses=[{"name": "download-0", "state": {"running": {}}}])
    told = describe(Snapshot(service(), pods=(loading,), downloads={name: "3 of 15 GB"}))
    assert told["engine"] == "weights: 3 of 15 GB"


def test_two_clusters_are_told_side_by_side() -> None:
    upgrading = service(
        conditions=[condition("Ready"), condition("UpgradeInProgress")],
        activeServiceStatus={"rayClusterName": "shoal-aaaaa"},
        pendingServiceStatus={"rayClusterName": "shoal-bbbbb", "trafficRoutedPercent": 40},
    )
    told = describe(Snapshot(upgrading))["service"]
    assert told == "cluster shoal-bbbbb comes up beside shoal-aaaaa, 40 % of the traffic moved"


def test_suspended_is_ended_only_when_the_pods_are_gone() -> None:
    ending = Ending("shoal", is_removal=False, now_s=0.0, limit_s=None)
    suspended = service(conditions=[condition("Suspended")])
    assert ending.observe(Snapshot(suspended, pods=(pod(),)), now_s=1.0) == ["pods: 1 pod to end"]
    assert ending.verdict.state == "going on"
    assert ending.observe(Snapshot(suspended), now_s=2.0) == ["pods: all gone"]
    assert ending.verdict.state == "ready"


def test_pods_that_do_not_end_are_named_at_the_limit() -> None:
    ending = Ending("shoal", is_removal=True, now_s=0.0, limit_s=5.0)
    ending.observe(Snapshot(None, pods=(pod(),)), now_s=5.0)
    assert "shoal-abcde-engine-x1" in ending.verdict.message


def test_suspension_that_nobody_does_asks_for_the_operator() -> None:
    ending = Ending("shoal", is_removal=False, now_s=0.0, limit_s=5.0)
    ending.observe(Snapshot(service()), now_s=5.0)
    assert "operator" in ending.verdict.hint


def test_pods_of_another_service_are_not_ours() -> None:
    assert is_pod_of(pod(cluster="shoal-abcde"), "shoal")
    assert not is_pod_of(pod(cluster="shoal-two-abcde"), "shoal")


def test_parked_change_shows_between_service_and_cluster() -> None:
    live = ready_service()
    spec = {"rayVersion": "2.60.0", "workerGroupSpecs": []}
    live["spec"]["rayClusterConfig"] = {**spec, "rayVersion": "2.61.0"}
    cluster = {"metadata": {"name": "shoal-abcde"}, "spec": spec}
    situation = situation_of(Snapshot(live, clusters=(cluster,)), num_gpus=0, spare="")
    assert situation.parked == ("rayVersion: 2.60.0 -> 2.61.0",)


def test_second_cluster_that_waits_for_room_is_stalled() -> None:
    unschedulable = {"type": "PodScheduled", "status": "False"}
    waiting_pod = pod(cluster="shoal-bbbbb", conditions=[unschedulable])
    snapshot = Snapshot(service(), pods=(waiting_pod, pod()))
    assert is_waiting_for_room(snapshot, "shoal-bbbbb")
    assert not is_waiting_for_room(snapshot, "shoal-abcde")


@pytest.mark.parametrize(
    ("changes", "url"),
    [
        ({}, ""),
        ({"expose": {"type": "ingress", "host": "chat.example.org"}}, "http://chat.example.org"),
        (
            {
                "expose": {
                    "type": "ingress",
                    "host": "chat.example.org",
                    "ingress": {"tlsSecret": "tls"},
                }
            },
            "https://chat.example.org",
        ),
        (
            {
                "expose": {
                    "type": "httproute",
                    "host": "chat.example.org",
                    "httproute": {"gateway": {"name": "g"}},
                }
            },
            "https://chat.example.org",
        ),
    ],
)
def test_address_is_the_outside_one_where_there_is_one(changes: Object, url: str) -> None:
    found = addresses_of(render(DEMO, **changes), context="c", namespace="n")
    assert found.url == url
    assert ("port-forward" in found.lines()[1]) == (not url)


def test_report_has_the_keys_of_a_laptops() -> None:
    addresses = addresses_of(render(DEMO), context="c", namespace="n")
    now = datetime(2026, 1, 1, 0, 1, tzinfo=UTC)
    report = report_of(Snapshot(ready_service(), pods=(pod(),)), addresses, now=now)
    assert (report["name"], report["phase"], report["is_ready"]) == ("shoal", "ready", True)
    assert (report["models"], report["uptime_s"]) == (["a"], 60.0)
    assert report["applications"]["model-a"]["status"] == "RUNNING"
