"""`shoal undeploy`: remove a release, wait until the operator has let go, say what stays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .chart_options import DEFAULT_NAME, Context, Namespace, NoWait, ReleaseName, Yes

if TYPE_CHECKING:
    from .change import Session

_KEEP = "helm.sh/resource-policy"
# Pods end when their longest stream has: the default of longest_generation_s, and some.
_TIMEOUT_S = 900.0


def undeploy(
    name: ReleaseName = DEFAULT_NAME,
    namespace: Namespace = None,
    context: Context = None,
    yes: Yes = False,
    no_wait: NoWait = False,
    timeout: Annotated[
        float, typer.Option(min=1, help="Wait for at most this long, in seconds.", metavar="S")
    ] = _TIMEOUT_S,
) -> None:
    """Remove a Shoal from a cluster; claims with weights stay."""
    from cluster.errors import ClusterError, InterruptedStartError
    from cluster.helm import documents
    from cluster.rollout.changes import ray_service
    from cluster.rollout.release import Release

    from . import rollout_console as say
    from .change import open_session

    session = open_session(name, context=context, namespace=namespace)
    objects = documents(session.helm.release(name).manifest)
    service = ray_service(objects)["metadata"]["name"]
    kept = [
        found
        for found in objects
        if (found["metadata"].get("annotations") or {}).get(_KEEP) == "keep"
    ]
    place = f"{session.kube.context}, namespace {session.kube.namespace}"
    session.console.print(f"Removing {name} from {place}; streams that run are cut.")
    say.confirm(question="Go on?", is_sure=yes)
    release = Release(session.kube, session.helm, name=name, service=service)
    with say.following(session.console, limit_s=timeout) as following:
        verdict = release.remove(None if no_wait else following)
    _print_kept(session, kept)
    if no_wait:
        session.console.print("Removed from Helm; the operator ends the pods.")
    elif verdict is None:
        raise InterruptedStartError("you stopped waiting; the operator goes on ending the pods")
    elif verdict.state != "ready":
        raise ClusterError(f"it is not gone yet: {verdict.message}", hint=verdict.hint)
    else:
        session.console.print("Removed; no pod is left.")


def _print_kept(session: Session, kept: list[dict[str, Any]]) -> None:
    where = f"kubectl --context {session.kube.context} -n {session.kube.namespace}"
    for found in kept:
        kind, name = found["kind"], found["metadata"]["name"]
        session.console.print(
            f"{kind} {name} stays. Delete it: {where} delete {kind.lower()} {name}"
        )
