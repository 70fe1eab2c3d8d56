"""The environment of every process of a run: what Ray, Serve and HAProxy read from variables.

Not configuration of Shoal: a user sets nothing here, and topology never depends on it. Ray takes
these settings from the environment only, and of every process before it starts.
"""

from __future__ import annotations

import os
import resource
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .folder import DEFAULT_NAME, RunFolder
from .ports import find_free_block, find_free_ports, is_port_free
from .processes import RUN_ID_VARIABLE

RUN_FOLDER_VARIABLE = "SHOAL_RUN_DIR"
HAS_PROXY = sys.platform.startswith("linux")  # elsewhere Serve has no HAProxy and listens itself
_LONGEST_START_S = 120  # of each of Ray's own processes
_DASHBOARD_PORT = 8265
_NUM_REPLICA_PORTS = 100
_MOST_CONNECTIONS = 4096
_FILES_BESIDE = 128


@dataclass(frozen=True, slots=True)
class RunPorts:
    """Every port that a run listens on, beside Ray's own that bind themselves."""

    dashboard: int
    proxy_statistics: int
    proxy_metrics: int
    fallback_http: int
    fallback_grpc: int
    first_replica: int

    @classmethod
    def choose(cls, name: str, *, port: int) -> RunPorts:
        """Free ports beside `port`, the API's; a default run's dashboard has Ray's usual one."""
        own = find_free_ports(5, besides={port})
        dashboard, statistics, metrics, fallback_http, fallback_grpc = own
        is_usual = name == DEFAULT_NAME and port != _DASHBOARD_PORT
        has_usual = is_usual and is_port_free(_DASHBOARD_PORT)
        return cls(
            dashboard=_DASHBOARD_PORT if has_usual else dashboard,
            proxy_statistics=statistics,
            proxy_metrics=metrics,
            fallback_http=fallback_http,
            fallback_grpc=fallback_grpc,
            first_replica=find_free_block(_NUM_REPLICA_PORTS, besides={port}),
        )


def build_environment(
    run: RunFolder,
    ports: RunPorts,
    *,
    longest_generation_s: float,
    base: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """`base` (default: our own environment) and everything that a process of the run needs."""
    environment = dict(os.environ if base is None else base)
    for name in [name for name in environment if name.startswith("RAY_")]:
        del environment[name]
    environment.update(_ray_variables(run))
    environment.update(_private_places(run))
    environment[RUN_ID_VARIABLE] = run.state.run_id
    environment[RUN_FOLDER_VARIABLE] = str(run.path)
    environment["PYTHONPATH"] = _with_own_package(environment.get("PYTHONPATH", ""))
    if HAS_PROXY:
        environment.update(_proxy_variables(run, ports, longest_generation_s=longest_generation_s))
    return environment


def _ray_variables(run: RunFolder) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(run.token_path),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's name for it is of another system: "0" keeps every server on 127.0.0.1, also here.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Ray runs its workers at 15: here they are the server, not a batch beside it.
        "RAY_worker_niceness": "0",
        "RAY_TMPDIR": str(run.temp_path),
        # Its limits of 30 s count from a start, however busy the machine.
        "RAY_gcs_server_port_wait_time_s": f"{_LONGEST_START_S}",
        "RAY_raylet_start_wait_time_s": f"{_LONGEST_START_S}",
        "RAY_agent_register_timeout_ms": f"{_LONGEST_START_S * 1000}",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": f"{_LONGEST_START_S}",
        "RAY_LOG_TO_DRIVER": "0",
        "RAY_DEDUP_LOGS": "0",
    }


def _with_own_package(python_path: str) -> str:
    """`python_path` with the folder that holds `cluster` and `serve`, installed or not."""
    own = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(dict.fromkeys([*filter(None, python_path.split(os.pathsep)), own]))


def _private_places(run: RunFolder) -> dict[str, str]:
    cache = str(run.path / "cache")
    return {
        "TMPDIR": str(run.temp_path),
        "XDG_CACHE_HOME": cache,
        "HF_HOME": cache,
        "TORCHINDUCTOR_CACHE_DIR": cache,
        "TRITON_CACHE_DIR": cache,
    }


def _proxy_variables(
    run: RunFolder, ports: RunPorts, *, longest_generation_s: float
) -> dict[str, str]:
    folder = run.proxy_path
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(folder / "launch"),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "a"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.proxy_statistics),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.proxy_metrics),
        # Serve ends a proxy that is late three times, and with it its own start.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_MAXCONN": str(max_connections()),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(int(longest_generation_s) + 60),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback_http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports.fallback_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports.first_replica),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.first_replica + _NUM_REPLICA_PORTS - 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }


def max_connections() -> int:
    """Connections that HAProxy is told to hold: Ray's number, or what open files allow.

    It counts 2.5 descriptors a connection (two sides and its pipes) and ends at its start where
    the hard limit is lower, as with the 1,024 of some containers.
    """
    _, num_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if num_files == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return max(16, min(_MOST_CONNECTIONS, (num_files - _FILES_BESIDE) * 2 // 5))


def write_proxy_launcher(run: RunFolder, *, host: str) -> None:
    """Write the small program that Ray starts in HAProxy's place: `cluster.haproxy` on `host`."""
    launcher = run.proxy_path / "launch"
    program = f"{shlex.quote(sys.executable)} -m cluster.haproxy --host {shlex.quote(host)}"
    launcher.write_text(f'#!/bin/sh\nexec {program} "$@"\n', encoding="utf-8")
    launcher.chmod(0o700)
