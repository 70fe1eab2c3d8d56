"""A Shoal of its own for a benchmark: started by the command line, looked at from outside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.local.folder import runs_path
from cluster.local.ports import find_free_ports


@dataclass(frozen=True, slots=True)
class ShoalRun:
    """A running Shoal: its port, its folder, and every process of it."""

    name: str
    port: int
    folder: Path

    def processes(self) -> list[psutil.Process]:
        """The supervisor and all that descends from it."""
        state = json.loads((self.folder / "state.json").read_text())
        owner = psutil.Process(state["owner"]["pid"])
        return [owner, *owner.children(recursive=True)]

    def serve_counters(self) -> dict[str, float]:
        """Ray Serve's request counters by metric and deployment, as Prometheus reads them."""
        found = self.folder / "r" / "prom_metrics_service_discovery.json"
        totals: dict[str, float] = {}
        for target in json.loads(found.read_text())[0]["targets"]:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                _add_counters(totals, answer.read().decode())
        return totals


def _add_counters(totals: dict[str, float], text: str) -> None:
    names = r"(ray_serve_(?:handle|deployment)_request_counter(?:_total)?)"
    for name, labels, value in re.findall(rf"^{names}\{{(.*)\}} (\S+)$", text, re.MULTILINE):
        deployment = re.search(r'deployment="([^"]*)"', labels)
        key = f"{name}/{deployment.group(1) if deployment else '?'}"
        totals[key] = totals.get(key, 0.0) + float(value)


def cpu_seconds(processes: list[psutil.Process]) -> dict[int, tuple[str, float]]:
    """User and system time of each process so far, with a short name."""
    found = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            found[process.pid] = (_short_name(process), times.user + times.system)
    return found


def memory_bytes(processes: list[psutil.Process]) -> dict[str, int]:
    """Proportional set size by short name: shared pages are divided among those who share them."""
    found: dict[str, int] = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            name = _short_name(process)
            found[name] = found.get(name, 0) + process.memory_full_info().pss
    return found


def _short_name(process: psutil.Process) -> str:
    command = process.cmdline()
    text = " ".join(command) or process.name()
    if text.startswith("ray::"):
        return text.split(".")[0].split(" ")[0]
    for known in ("haproxy", "gcs_server", "raylet", "dashboard", "cluster"):
        if known in text:
            return known
    return os.path.basename(command[0]) if command else process.name()


def free_port() -> int:
    """A port that nobody listens on."""
    return find_free_ports(1)[0]


@contextlib.contextmanager
def run_shoal(name: str, models: str) -> Iterator[ShoalRun]:
    """`shoal up` in the background with the YAML list `models`; ended on leaving."""
    port = free_port()
    command = [sys.executable, "-m", "cluster"]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "bench.yaml"
        config.write_text(f"http: {{port: {port}}}\nmodels:\n{models}")
        subprocess.run([*command, "up", str(config), "--name", name, "--detach"], check=True)
    try:
        yield ShoalRun(name, port, runs_path() / name)
    finally:
        subprocess.run([*command, "down", "--name", name], check=True)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown",
    )
    return {"cpu": cpu, "num_cores": os.cpu_count(), "load_1min": os.getloadavg()[0]}


def write_results(name: str, results: dict[str, Any]) -> Path:
    """Write `bench-results/<name>.json` in the working directory; returns its path."""
    folder = Path("bench-results")
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    return path
