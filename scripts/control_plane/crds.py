"""The CRDs that the chart's objects are checked against; they are not part of this repository."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from .api import Api
from .tools import ROOT, ToolMissingError

# What the chart renders; the others in the folder belong to things that Shoal does not use.
USED = (
    "ray.io_rayservices",
    "ray.io_rayclusters",
    "monitoring.coreos.com_podmonitors",
    "monitoring.coreos.com_prometheusrules",
    "gateway.networking.k8s.io_gateways",
    "gateway.networking.k8s.io_httproutes",
)
# Seconds of computing on an idle machine; a crowded one takes its time.
_ESTABLISHED_S = 120.0


def find_crds() -> Path:
    """The folder of CRD files: `SHOAL_CRDS`, else `shared/k8s/crds` beside the checkout.

    Raises:
        ToolMissingError: there is none.
    """
    if chosen := os.environ.get("SHOAL_CRDS"):
        folder = Path(chosen)
    else:
        folder = ROOT.parent / "shared" / "k8s" / "crds"
    if not (folder / f"{USED[0]}.yaml").exists():
        raise ToolMissingError(
            f"no CRDs in {folder}: set SHOAL_CRDS to a folder with KubeRay's {USED[0]}.yaml"
        )
    return folder


def install_crds(api: Api, folder: Path) -> None:
    """Applies the files in `USED` and returns when the server serves them all.

    Server-side, as KubeRay's own manual says: they are too big for a last-applied annotation.
    """
    paths = [_install(api, (folder / f"{name}.yaml").read_text()) for name in USED]
    deadline = time.monotonic() + _ESTABLISHED_S
    while not all(_is_established(api, path) for path in paths):
        if time.monotonic() > deadline:
            raise TimeoutError(f"CRDs not established in {_ESTABLISHED_S} s")
        time.sleep(0.1)


def _install(api: Api, text: str) -> str:
    found = re.search(r"^  name: (\S+)$", text, flags=re.MULTILINE)
    assert found, "a CRD has a name"
    path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{found[1]}"
    api.apply_text(path, text)
    return path


def _is_established(api: Api, path: str) -> bool:
    conditions = api.request("GET", path).get("status", {}).get("conditions", [])
    return any(
        condition["type"] == "Established" and condition["status"] == "True"
        for condition in conditions
    )
