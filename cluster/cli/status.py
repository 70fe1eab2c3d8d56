"""`shoal status`: what runs, where, and how its parts are; on this machine or on a cluster."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .chart_options import Context, Namespace

if TYPE_CHECKING:
    from cluster.kube import Kube
    from cluster.local.folder import RunFolder
    from cluster.rollout.addresses import Addresses

Report = dict[str, Any]


def status(
    name: Annotated[
        str | None, typer.Option(help="Only the Shoal of this name (default: all of them).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON array.")] = False,
    context: Context = None,
    namespace: Namespace = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="On a cluster: watch until it is ready.")
    ] = False,
) -> None:
    """Show what runs here; with --context or --namespace, what runs on a cluster."""
    from rich.console import Console

    from cluster.errors import NotRunningError, UsageError

    has_cluster = context is not None or namespace is not None
    if follow and (not has_cluster or name is None):
        raise UsageError("--follow: is for one Shoal on a cluster: --namespace NS --name NAME")
    if follow:
        _follow(str(name), context=context, namespace=namespace)
    reports = _reports(name, context, namespace) if has_cluster else _local_reports(name)
    if as_json:
        print(json.dumps(reports, indent=2))
    elif reports:
        console = Console(soft_wrap=True, highlight=False)
        for report in reports:
            console.print("\n".join(_lines(report)), markup=False)
    if not reports:
        start = "shoal deploy" if has_cluster else "shoal up"
        raise NotRunningError("no Shoal is running", hint=f"Start one with: {start}")


def _local_reports(name: str | None) -> list[Report]:
    from cluster.local.folder import list_runs, open_run

    return [describe(run) for run in (list_runs() if name is None else [open_run(name)])]


def describe(run: RunFolder) -> Report:
    """Everything that is known of a run, as JSON can hold it."""
    from cluster.local.loopback_http import ServeApi, call
    from cluster.local.progress import kernels_of

    state = run.state
    phase = state.phase if state.is_owned() else "dead"
    report: Report = {
        "name": state.name,
        "phase": phase,
        "is_ready": False,
        "address": state.address,
        "addresses": state.addresses,
        "dashboard": state.dashboard_address,
        "token_file": str(run.token_path),
        "models": list(state.models),
        "uptime_s": round(time.time() - state.started_at, 1),
        "supervisor_pid": state.owner.pid,
        "num_processes": sum(process.find() is not None for process in state.processes),
        "applications": {},
    }
    if phase in ("ready", "starting"):
        try:
            answer = call("GET", state.port, "/health/ready", host=state.contact_host)
            report["is_ready"] = answer.is_ok
        except OSError:
            pass
        api = ServeApi(state.dashboard_port, run.token_path)
        report["applications"] = _applications(api.applications())
        for application, found in report["applications"].items():
            found["kernels"] = kernels_of(run.progress_path, application)
    return report


def _applications(found: Report) -> Report:
    return {
        name: {
            "status": application.get("status"),
            "message": application.get("message", ""),
            "replicas": {
                deployment_name: [replica.get("state") for replica in deployment["replicas"]]
                for deployment_name, deployment in application.get("deployments", {}).items()
                if deployment.get("replicas")
            },
        }
        for name, application in found.items()
    }


def _reports(name: str | None, context: str | None, namespace: str | None) -> list[Report]:
    from datetime import UTC, datetime

    from cluster.errors import NotRunningError
    from cluster.kube import RAY_SERVICE, connect
    from cluster.rollout.follow import Watcher
    from cluster.rollout.report import report_of

    kube = connect(context=context, namespace=namespace)
    services = kube.select(RAY_SERVICE, labels="app.kubernetes.io/part-of=shoal")
    names = [str(found["metadata"]["name"]) for found in services]
    if name is not None and name not in names:
        raise NotRunningError(
            f"no Shoal named {name!r} in {kube.context}, namespace {kube.namespace}",
            hint=f"There: {', '.join(names) or 'none'}",
        )
    return [
        report_of(
            Watcher(kube, found, has_past=True).look(),
            _live_addresses(kube, found),
            now=datetime.now(UTC),
        )
        for found in names
        if name in (None, found)
    ]


def _live_addresses(kube: Kube, name: str) -> Addresses:
    from contextlib import suppress

    from cluster.errors import ForbiddenError
    from cluster.kube import HTTP_ROUTE, INGRESS, RAY_SERVICE, SERVICE
    from cluster.rollout.addresses import addresses_of

    kinds = {"RayService": RAY_SERVICE, "Service": SERVICE}
    objects = {kind: kube.get(where, name) for kind, where in kinds.items()}
    for kind, where in {"Ingress": INGRESS, "HTTPRoute": HTTP_ROUTE}.items():
        with suppress(ForbiddenError):  # who may not see it can still forward a port
            objects[kind] = kube.get(where, name)
    found = [{"kind": kind, **item} for kind, item in objects.items() if item is not None]
    return addresses_of(found, context=kube.context, namespace=kube.namespace)


def _follow(name: str, *, context: str | None, namespace: str | None) -> None:
    from cluster.kube import connect
    from cluster.rollout.release import watch

    from . import rollout_console as say

    kube = connect(context=context, namespace=namespace)
    console = say.make_console()
    with say.following(console, limit_s=None) as following:
        verdict = watch(kube, name, following)
    say.end(verdict, kube, name)


def _lines(report: Report) -> list[str]:
    from .display import duration

    if report["phase"] == "dead":
        return [f"{report['name']}: its supervisor was killed; clean up with: shoal down"]
    lines = [
        f"{report['name']}: {report['phase']}{'' if report['is_ready'] else ', not ready'},"
        f" for {duration(report['uptime_s'])}",
        *_ways(report),
        f"  models          {', '.join(report['models'])}",
    ]
    if "num_processes" in report:
        lines.append(f"  processes       {report['num_processes']}")
    else:
        lines.append(f"  pods            {report['num_pods']}")
    width = max([15, *map(len, (*report["applications"], *report.get("parts", {})))])
    for name, application in report["applications"].items():
        copies = ", ".join(
            f"{deployment} {'+'.join(states).lower()}"
            for deployment, states in application["replicas"].items()
        )
        lines.append(f"  {name:<{width}} {str(application['status']).lower()}  {copies}".rstrip())
        if application.get("kernels"):
            lines.append(f"    kernels: {', '.join(application['kernels'])}")
        if application["message"]:
            lines.append(f"    {application['message']}")
    lines += [
        f"  {part:<{width}} {state}"
        for part, state in report.get("parts", {}).items()
        if part not in report["applications"]
    ]
    if report.get("cause"):
        lines.append(f"  {report['cause']}")
    return lines


def _ways(report: Report) -> list[str]:
    """How to reach the API and the dashboard."""
    from .display import address_lines

    if "token_file" in report:
        return [
            *address_lines(report["addresses"]),
            f"  Ray dashboard   {report['dashboard']}  (token: cat {report['token_file']})",
        ]
    forward = report["port_forward"]
    return [
        *address_lines([report["address"]]),
        *([f"                  through: {forward}"] if forward else []),
        f"  Ray dashboard   {report['dashboard']}",
        f"                  its token: {report['token']}",
    ]
