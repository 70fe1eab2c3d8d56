"""Where a Shoal on a cluster is reached, as lines to print: read from its objects.

Pure. Nothing here opens a connection: a port-forward is a command for the user's own terminal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Manifest = dict[str, Any]
_DASHBOARD_PORT = 8265


@dataclass(frozen=True, slots=True)
class Addresses:
    """`url` is empty where only the port-forward reaches it; commands are for a shell."""

    url: str
    api_forward: str
    api_port: int
    dashboard_forward: str
    token_command: str

    @property
    def api(self) -> str:
        """The address to use: the outside one, or the forwarded one."""
        return self.url or f"http://127.0.0.1:{self.api_port}"

    def lines(self) -> list[str]:
        """What is printed at the end of a deployment."""
        lines = [f"  API and page    {self.api}"]
        if not self.url:
            lines.append(f"                  through: {self.api_forward}")
        return [
            *lines,
            f"  Ray dashboard   http://127.0.0.1:{_DASHBOARD_PORT}",
            f"                  through: {self.dashboard_forward}",
            f"                  it asks for a token: {self.token_command}",
        ]


def addresses_of(objects: list[Manifest], *, context: str, namespace: str) -> Addresses:
    """The addresses of a rendering, or of live objects (a LoadBalancer's status is read)."""
    kubectl = f"kubectl --context {context} -n {namespace}"
    service = _only(objects, "Service")
    name = _only(objects, "RayService")["metadata"]["name"]
    token = _only(objects, "RayService")["spec"]["rayClusterConfig"]["authOptions"]["secretName"]
    token_key = "-o jsonpath='{.data.auth_token}' | base64 -d"
    port = int(service["spec"]["ports"][0]["port"])
    return Addresses(
        url=_outside(objects, service, port),
        api_forward=f"{kubectl} port-forward service/{service['metadata']['name']} {port}:{port}",
        api_port=port,
        dashboard_forward=f"{kubectl} port-forward service/{name}-head-svc"
        f" {_DASHBOARD_PORT}:{_DASHBOARD_PORT}",
        token_command=f"{kubectl} get secret {token} {token_key}",
    )


def _outside(objects: list[Manifest], service: Manifest, port: int) -> str:
    for found in objects:
        if found["kind"] == "Ingress" and found["spec"].get("rules"):
            scheme = "https" if found["spec"].get("tls") else "http"
            return f"{scheme}://{found['spec']['rules'][0].get('host', '')}"
        if found["kind"] == "HTTPRoute" and found["spec"].get("hostnames"):
            return f"https://{found['spec']['hostnames'][0]}"
    balancer = (service.get("status") or {}).get("loadBalancer") or {}
    for entry in balancer.get("ingress") or []:
        return f"http://{entry.get('hostname') or entry.get('ip')}:{port}"
    return ""


def _only(objects: list[Manifest], kind: str) -> Manifest:
    return next(found for found in objects if found["kind"] == kind)
