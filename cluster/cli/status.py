"""`shoal status`: what runs, where, and how its parts are."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cluster.local.folder import RunFolder


def status(
    name: Annotated[
        str | None, typer.Option(help="Only the Shoal of this name (default: all of them).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON array.")] = False,
) -> None:
    """Show what runs: address, models, copies, time since the start."""
    from rich.console import Console

    from cluster.errors import NotRunningError
    from cluster.local.folder import list_runs, open_run

    runs = list_runs() if name is None else [open_run(name)]
    reports = [describe(run) for run in runs]
    if as_json:
        print(json.dumps(reports, indent=2))
    elif reports:
        console = Console(soft_wrap=True, highlight=False)
        for report in reports:
            console.print("\n".join(_lines(report)), markup=False)
    if not reports:
        raise NotRunningError("no Shoal is running", hint="Start one with: shoal up")


def describe(run: RunFolder) -> dict[str, Any]:
    """Everything that is known of a run, as JSON can hold it."""
    from cluster.local.loopback_http import ServeApi, call

    state = run.state
    phase = state.phase if state.is_owned() else "dead"
    report: dict[str, Any] = {
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
    return report


def _applications(found: dict[str, Any]) -> dict[str, Any]:
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


def _lines(report: dict[str, Any]) -> list[str]:
    from .display import address_lines

    minutes, seconds = divmod(int(report["uptime_s"]), 60)
    if report["phase"] == "dead":
        return [f"{report['name']}: its supervisor was killed; clean up with: shoal down"]
    lines = [
        f"{report['name']}: {report['phase']}{'' if report['is_ready'] else ', not ready'},"
        f" since {minutes} min {seconds} s",
        *address_lines(report["addresses"]),
        f"  Ray dashboard   {report['dashboard']}  (token: cat {report['token_file']})",
        f"  models          {', '.join(report['models'])}",
        f"  processes       {report['num_processes']}",
    ]
    for name, application in report["applications"].items():
        copies = ", ".join(
            f"{deployment} {'+'.join(states).lower()}"
            for deployment, states in application["replicas"].items()
        )
        lines.append(f"  {name:<15} {str(application['status']).lower()}  {copies}".rstrip())
        if application["message"]:
            lines.append(f"    {application['message']}")
    return lines
