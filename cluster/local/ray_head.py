"""Starts Ray's processes on this machine and ends; run as `python -m cluster.local.ray_head`.

Not a supervisor: the processes it leaves behind become children of the nearest subreaper. It does
what `ray start --head` does, for two reasons: the dashboard (4 s on 2 cores) comes up beside the
raylet instead of before it, and the command's own imports (2 s) are spared. Measured on 2 cores:
`ray start` 10.0 s, this 5.5 s. Ray's autoscaler, log monitor and client server are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

# "[2026-11-22 19:55:36,123 C 71 71] (raylet) main.cc:10: what went wrong"
_ERROR_LINE = re.compile(r"^\[\S+ \S+ [EC] \d+ \d+\] \(\w+\) \S+: +(.+)$", re.MULTILINE)


def start_head(
    *, temp_path: Path, dashboard_port: int, num_logical_cpus: int, object_store_bytes: int
) -> None:
    """Start GCS, raylet and dashboard on loopback; returns once all of them answer.

    Raises:
        Exception: what Ray says about the part that did not start.
    """
    from ray._private import node as ray_node
    from ray._private import services
    from ray._private.parameter import RayParams
    from ray._private.ray_constants import PROCESS_TYPE_RAYLET

    find_node: Any = services.get_node
    base: Any = ray_node.Node  # untyped

    class _Head(base):  # type: ignore[misc]
        def start_api_server(
            self, *, include_dashboard: bool | None, raise_on_failure: bool
        ) -> None:
            self.dashboard_failure: BaseException | None = None

            def start() -> None:
                try:
                    super(_Head, self).start_api_server(
                        include_dashboard=include_dashboard, raise_on_failure=raise_on_failure
                    )
                except BaseException as exc:
                    self.dashboard_failure = exc

            self.dashboard_starter = threading.Thread(target=start, name="dashboard")
            self.dashboard_starter.start()

        def join_dashboard(self) -> None:
            self.dashboard_starter.join()
            if self.dashboard_failure is not None:
                raise self.dashboard_failure

        def start_ray_processes(self) -> None:
            """Wait until the GCS knows this node, as long as the raylet lives."""
            super().start_ray_processes()
            (raylet,) = self.all_processes[PROCESS_TYPE_RAYLET]
            has_answered = threading.Event()

            def ask() -> None:  # blocks for as long as the environment's limit of the start
                with contextlib.suppress(RuntimeError):  # the base class asks again, and says so
                    find_node(self.gcs_address, self.node_id)
                has_answered.set()

            threading.Thread(target=ask, name="node", daemon=True).start()
            while not has_answered.wait(0.05):
                if raylet.process.poll() is not None:
                    raise RuntimeError(
                        f"the raylet ended with code {raylet.process.returncode}"
                        f"{last_error(Path(self.get_logs_dir_path()) / 'raylet.out')}"
                    )

    make_parameters: Any = RayParams  # its annotations are of another release
    parameters = make_parameters(
        node_ip_address="127.0.0.1",
        num_cpus=num_logical_cpus,
        object_store_memory=object_store_bytes,
        temp_dir=str(temp_path),
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=dashboard_port,
        dashboard_agent_listen_port=0,
        no_monitor=True,
        include_log_monitor=False,
    )
    head = _Head(parameters, head=True, shutdown_at_exit=False, spawn_reaper=False)
    head.join_dashboard()
    print(head.gcs_address, flush=True)  # noqa: T201


def last_error(log: Path) -> str:
    """The last error in a log of one of Ray's C++ processes, behind a colon; "" where none is."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    found = _ERROR_LINE.findall(text)
    return f": {found[-1]}" if found else ""


def main() -> None:
    """Parse the arguments, start, and leave without Ray's exit handlers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--temp-path", type=Path, required=True)
    parser.add_argument("--dashboard-port", type=int, required=True)
    parser.add_argument("--num-logical-cpus", type=int, required=True)
    parser.add_argument("--object-store-bytes", type=int, required=True)
    arguments = parser.parse_args()
    code = 0
    try:
        start_head(**vars(arguments))
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
