"""`shoal up` with the toy application: `python -m toy_up NAME PORT [FAILURE]` from this folder."""

from __future__ import annotations

import sys
import time

from cluster.errors import CommandError
from cluster.local.folder import create_run
from cluster.local.interrupts import Interrupts
from cluster.local.progress import PhaseEvent
from cluster.local.supervisor import Deployment, Supervisor


class Printer:
    def on_event(self, event: PhaseEvent) -> None:
        print(event.kind, event.phase, f"{event.seconds:.1f}", event.message, flush=True)


def main() -> None:
    name, port = sys.argv[1], int(sys.argv[2])
    failure = sys.argv[3] if len(sys.argv) > 3 else ""
    application = {
        "name": "toy",
        "route_prefix": "/",
        "import_path": "toy_app:build",
        "args": {"failure": failure},
    }
    body = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [application],
    }
    with Interrupts() as interrupts:
        run = create_run(name)
        deployment = Deployment(body, "127.0.0.1", port, ("toy",), longest_generation_s=20.0)
        supervisor = Supervisor(run, deployment, listener=Printer(), interrupts=interrupts)
        try:
            supervisor.start()
            supervisor.watch()
        except CommandError as exc:
            print("failed:", exc.message, flush=True)
        finally:
            began = time.monotonic()
            supervisor.stop()
            print(f"stopped {time.monotonic() - began:.1f}", flush=True)


if __name__ == "__main__":
    main()
