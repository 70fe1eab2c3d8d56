"""Ray nodes as KubeRay starts them, side by side on this machine's loopback, with a token.

The environment is the image's own (`ENV` of the Dockerfile), beside it what the operator injects.
What differs from pods, because the nodes share one machine: ports and folders of each.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from cluster.local.ports import find_free_block, find_free_ports
from cluster.local.processes import RUN_ID_VARIABLE, processes_of_run

REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = REPOSITORY / "scripts" / "image" / "Dockerfile"
SCRIPTS = Path(sys.executable).parent
TOKEN = "0123456789abcdef0123456789abcdef"
_STARTED = "Ray runtime started."
_TIMEOUT_S = 240.0
_NUM_ATTEMPTS = 3  # Ray gives its raylet 30 s, on a machine however busy
_HEAD = (
    f"{SCRIPTS}/ray start --head --block --node-ip-address=127.0.0.1"
    " --object-store-memory=100000000 --dashboard-agent-listen-port=0 --metrics-export-port=0"
    " --no-monitor --include-log-monitor=false"
)
# `ray start --address` without the command: on loopback alone it takes one node for the only one.
_JOIN = f"""
import sys, threading
from ray._private.node import Node
from ray._private.parameter import RayParams
parameters = RayParams(gcs_address=sys.argv[1], node_ip_address="127.0.0.1", num_cpus=4,
    object_store_memory=100_000_000, dashboard_agent_listen_port=0, include_log_monitor=False)
node = Node(parameters, head=False, shutdown_at_exit=True, spawn_reaper=False)
print({_STARTED!r}, flush=True)
threading.Event().wait()
"""
_MACHINE = {"PATH", "HOME", "USER", "LANG"}


def image_environment() -> dict[str, str]:
    """The variables that the image sets, as its Dockerfile's one `ENV` says."""
    text = DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", " ")
    (words,) = [line[4:] for line in text.splitlines() if line.startswith("ENV ")]
    return dict(word.split("=", 1) for word in shlex.split(words))


class RayNodes:
    """The nodes of one cluster; `stop` ends every process of theirs and nothing else."""

    def __init__(self) -> None:
        # Short: Ray's sockets lie below it.
        self._folder = Path(tempfile.mkdtemp(prefix="sc-", dir="/tmp"))
        self._replica_ports = find_free_block(100)
        self._places: list[Path] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def start_head(self, *, dashboard_port: int) -> str:
        """Start a head without CPUs; returns the address that other nodes join."""
        gcs, client = find_free_ports(2)
        options = (
            f"--num-cpus=0 --port={gcs} --ray-client-server-port={client}"
            f" --dashboard-host=127.0.0.1 --dashboard-port={dashboard_port}"
        )
        self._start("h", lambda place: shlex.split(f"{_HEAD} --temp-dir={place} {options}"), {})
        return f"127.0.0.1:{gcs}"

    def start_engine(self, head: str, *, http_port: int) -> None:
        """Start a node that holds a replica; its HAProxy listens on a port of its own."""
        more = {"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(http_port)}
        self._start("e", lambda _: [sys.executable, "-c", _JOIN, head], more)

    def stop(self) -> None:
        """End engines before the head, as a pod ends: SIGTERM, later SIGKILL to what is left."""
        for place in reversed(self._places):
            _end(str(place))
        for process in self._processes:
            process.wait()
        shutil.rmtree(self._folder)

    def _start(self, name: str, command: Callable[[Path], list[str]], more: dict[str, str]) -> None:
        for attempt in range(_NUM_ATTEMPTS):
            place = self._folder / f"{name}{attempt}"
            place.mkdir()
            self._places.append(place)
            log = place / "log"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    command(place),
                    env=self._environment(place) | more,
                    cwd=place,
                    stdout=output,
                    stderr=output,
                )
            self._processes.append(process)
            deadline = time.monotonic() + _TIMEOUT_S
            while process.poll() is None and time.monotonic() < deadline:
                if _STARTED in log.read_text(encoding="utf-8"):
                    return
                time.sleep(0.1)
            _end(str(place))
        raise AssertionError(log.read_text(encoding="utf-8"))

    def _environment(self, place: Path) -> dict[str, str]:
        statistics, metrics, fallback_http, fallback_grpc = map(str, find_free_ports(4))
        return {
            **{name: os.environ[name] for name in _MACHINE & os.environ.keys()},
            **{name: text for name, text in image_environment().items() if name not in _MACHINE},
            "PATH": f"{SCRIPTS}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(SCRIPTS / "shoal-haproxy"),
            # What the chart sets.
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "660",
            # What the operator injects.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_SERVE_KV_TIMEOUT_S": "5",
            # Two nodes on one machine, on its loopback.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(place / "p" / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(place / "p" / "a"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(place / "p" / "m"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(place / "p"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(place / "p" / "server-state"),
            "RAY_SERVE_HAPROXY_STATS_PORT": statistics,
            "RAY_SERVE_HAPROXY_METRICS_PORT": metrics,
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": fallback_http,
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": fallback_grpc,
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(self._replica_ports),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(self._replica_ports + 99),
            RUN_ID_VARIABLE: str(place),
        }


def _end(run_id: str) -> None:
    """End every process of a node."""
    for grace_s, sign in ((20.0, "terminate"), (10.0, "kill")):
        alive = [found for one in processes_of_run(run_id) if (found := one.find()) is not None]
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(process, sign)()
        psutil.wait_procs(alive, timeout=grace_s)
