"""Why a rollout does not get on: every reason in a snapshot, the deepest first.

Pure. Not a verdict: a reason becomes one when it has stood for its patience (`rollout`). The one
decision: reasons are ranked from what the user can change towards what merely follows from it, so
that one root cause is shown and not the ten symptoms it has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .snapshot import Manifest, Snapshot, containers_of, pod_group

_SHORT_S, _LONG_S = 10.0, 45.0


@dataclass(frozen=True, slots=True)
class Cause:
    """A reason that stands for `patience_s` ends the rollout; None: only time does."""

    message: str
    hint: str
    patience_s: float | None


def causes(snapshot: Snapshot) -> list[Cause]:
    """Every reason, the deepest first."""
    return [
        *_of_service(snapshot),
        *_of_events(snapshot),
        *(
            cause
            for pod in snapshot.pods
            if "deletionTimestamp" not in pod["metadata"]
            for cause in _of_pod(pod)
        ),
        *(_of_applications(snapshot) if snapshot.is_observed else ()),
    ]


def _of_service(snapshot: Snapshot) -> Iterator[Cause]:
    ready = snapshot.condition("Ready")
    if ready.get("reason") == "ValidationFailed":
        yield Cause(
            f"KubeRay refuses the RayService: {ready.get('message')}",
            "The values name something that this operator does not know; is it 1.7 or later?",
            _SHORT_S,  # an older specification's may stand until the operator looks again
        )
    if ready.get("reason") == "InitializingTimeout":
        yield Cause(
            f"KubeRay gave up: {ready.get('message')}",
            "It does not try again: shoal undeploy, remove ray.io/initializing-timeout, deploy.",
            _SHORT_S,
        )


_REFUSALS = (
    (
        re.compile(r"violates PodSecurity (.*)", re.DOTALL),
        "the namespace's pod security refuses the {what} pod: {found}",
        "Shoal's own pods pass `restricted`: look at extra.* and security.* in the values.",
    ),
    (
        re.compile(r"exceeded quota: (.*)", re.DOTALL),
        "the namespace's quota has no room for the {what} pod: {found}",
        "Ask for a larger quota, or set smaller resources (kubectl describe quota).",
    ),
    (
        re.compile(r"((?:Pod|RayCluster|Role|ServiceAccount)\S* .* is invalid: .*)", re.DOTALL),
        "the API server refuses the {what}: {found}",
        "The values ask for something that this cluster does not take.",
    ),
    (
        re.compile(r"(admission webhook .*)", re.DOTALL),
        "a policy of this cluster refuses the {what}: {found}",
        "Ask who runs the cluster about the policy that is named.",
    ),
    (
        re.compile(r"((?:\S+ )?(?:\S+ )?is forbidden: .*)", re.DOTALL),
        "KubeRay may not make the {what}: {found}",
        "The operator's ClusterRole lacks it: install KubeRay's chart of the same version.",
    ),
)


def _of_events(snapshot: Snapshot) -> Iterator[Cause]:
    for event in snapshot.events:
        reason = str(event.get("reason", ""))
        if event.get("type") != "Warning" or not reason.startswith(("FailedToCreate", "Invalid")):
            continue
        text = str(event.get("message", ""))
        what = {"FailedToCreateHeadPod": "head", "FailedToCreateWorkerPod": "engine"}.get(
            reason, reason.removeprefix("FailedToCreate")
        )
        yield _of_refusal(text, what)


def _of_refusal(text: str, what: str) -> Cause:
    for pattern, message, hint in _REFUSALS:
        found = pattern.search(text)
        if found is not None:
            return Cause(message.format(what=what, found=found[1].strip()), hint, _SHORT_S)
    return Cause(f"KubeRay could not make the {what}: {text}", "", None)


def _of_pod(pod: Manifest) -> Iterator[Cause]:
    group, name = pod_group(pod), pod["metadata"]["name"]
    for container in containers_of(pod):
        yield from _of_container(container, group, name)
    for condition in (pod.get("status") or {}).get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            yield Cause(
                f"no node takes the {group} pod: {condition.get('message', 'unschedulable')}",
                "Free or add a node, or change hardware.preset, node_selector or tolerations.",
                None,  # a cluster autoscaler may be adding a node
            )


_WAITING = {
    "InvalidImageName": ("the image's name is not one", "image.repository and image.tag", 0.0),
    "ErrImageNeverPull": ("the image is not on the node", "image.pullPolicy", _SHORT_S),
    "ErrImagePull": ("the image cannot be pulled", "", None),
    "ImagePullBackOff": (
        "the image cannot be pulled",
        "image.repository, image.tag and image.pullSecrets",
        _LONG_S,
    ),
    "CreateContainerConfigError": (
        "the container cannot be made",
        "the Secrets that the values name",
        _SHORT_S,
    ),
    "CreateContainerError": ("the container cannot be made", "extra.* and the image", _SHORT_S),
    "RunContainerError": ("the container cannot be started", "the image", _SHORT_S),
}


def _of_container(container: Manifest, group: str, pod: str) -> Iterator[Cause]:
    state, name = container.get("state") or {}, container.get("name", "")
    waiting = state.get("waiting") or {}
    known = _WAITING.get(waiting.get("reason", ""))
    if known is not None:
        what, key, patience_s = known
        text = waiting.get("message") or waiting["reason"]
        hint = f"Check {key} in the values." if key else ""
        yield Cause(f"{group}: {what}: {text}", hint, patience_s)
    last = (container.get("lastState") or {}).get("terminated") or state.get("terminated") or {}
    if last.get("exitCode", 0) == 0:
        return
    if last.get("reason") == "OOMKilled":
        yield Cause(
            f"{group}: container {name!r} needed more memory than its limit",
            "Raise hardware.overrides.pod.memory, or lower max_model_len.",
            _SHORT_S,
        )
    elif waiting.get("reason") == "CrashLoopBackOff" or container.get("restartCount", 0) > 1:
        said = str(last.get("message") or f"exit code {last['exitCode']}").strip()
        yield Cause(
            f"{group}: container {name!r} ends again and again: {said}",
            f"Its log: kubectl logs {pod} -c {name} --previous",
            _LONG_S,
        )


def _of_applications(snapshot: Snapshot) -> Iterator[Cause]:
    for name, application in snapshot.applications.items():
        if application.get("status") == "DEPLOY_FAILED":
            yield Cause(
                f"Serve could not start {name}: {_last_line(application.get('message'))}",
                "The whole story: Ray's dashboard, or kubectl logs of the engine pod.",
                _SHORT_S,
            )
        elif application.get("status") == "UNHEALTHY":
            yield Cause(
                f"{name} is unhealthy: {_last_line(application.get('message'))}",
                "Serve restarts it; the log of the engine pod says why it ends.",
                None,
            )


def _last_line(message: object) -> str:
    """The end of a Python traceback is its cause."""
    lines = [line.strip() for line in str(message or "").splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
