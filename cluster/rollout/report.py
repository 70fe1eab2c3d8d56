"""What `shoal status` knows of a Shoal on a cluster, in the form it has on a laptop.

Pure: from a snapshot.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from .addresses import Addresses
from .causes import causes
from .rollout import Goal, describe, is_done
from .snapshot import Manifest, Snapshot, serve_config


def report_of(snapshot: Snapshot, addresses: Addresses, *, now: datetime) -> dict[str, Any]:
    """Everything that is known, as JSON can hold it; the same keys as a local Shoal's and more."""
    service = snapshot.service or {}
    name = str(service["metadata"]["name"])
    found = causes(snapshot)
    phase = _phase(snapshot, name)
    return {
        "name": name,
        "phase": phase,
        "is_ready": snapshot.is_true("Ready"),
        "address": addresses.api,
        "port_forward": "" if addresses.url else addresses.api_forward,
        "dashboard": addresses.dashboard_forward,
        "token": addresses.token_command,
        "models": models_of(service),
        "uptime_s": _seconds_since(snapshot, now),
        "num_pods": len(snapshot.pods),
        "parts": {} if phase == "ready" else describe(snapshot),
        "cause": found[0].message if found and phase != "ready" else "",
        "applications": {
            application: {
                "status": status.get("status"),
                "message": status.get("message", ""),
                "replicas": {
                    deployment: [part.get("status")]
                    for deployment, part in (status.get("serveDeploymentStatuses") or {}).items()
                },
            }
            for application, status in snapshot.applications.items()
        },
    }


def models_of(service: Manifest) -> list[str]:
    """Names that clients ask for."""
    config = serve_config(service)
    named = (entry.get("args", {}).get("model", {}) for entry in config.get("applications", []))
    return [str(model["name"]) for model in named if model.get("name")]


def _phase(snapshot: Snapshot, name: str) -> str:
    if snapshot.is_deleting:
        return "ending"
    if snapshot.is_true("Suspended"):
        return "suspended"
    if snapshot.is_true("Suspending"):
        return "suspending"
    if snapshot.is_true("UpgradeInProgress"):
        return "upgrading"
    return "ready" if is_done(snapshot, Goal(name)) else "starting"


def _seconds_since(snapshot: Snapshot, now: datetime) -> float:
    """Since it became ready or ceased to be, else since it was made."""
    ready = snapshot.condition("Ready").get("lastTransitionTime")
    since = ready or (snapshot.service or {})["metadata"]["creationTimestamp"]
    started = datetime.fromisoformat(str(since).replace("Z", "+00:00"))
    return round(max((now.astimezone(UTC) - started).total_seconds(), 0.0), 1)
