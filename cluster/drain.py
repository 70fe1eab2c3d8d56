"""What a pod runs before it is stopped: waits until no request is open on its node.

Not Serve's own draining, which starts only when Serve learns that a replica goes: Kubernetes stops
the whole pod. The one decision: Ray's metrics of this node count the open requests of every replica
on it, so nothing has to be asked of the cluster, which may be stopping too. The pod's grace period
is the limit; there is none here. Standard library only.
"""

from __future__ import annotations

import sys
import time
import urllib.request
from collections.abc import Callable
from http.client import HTTPException

METRICS_URL = "http://127.0.0.1:8080/metrics"
OPEN_REQUESTS = "ray_serve_replica_processing_queries"
# Ray refreshes its metrics every ten seconds: older figures may miss a request that just came in,
# and endpoints take some seconds to forget a pod.
_REPORT_S = 10.0
_NUM_QUIET = 3
# A node that is busy may miss one answer; streams are cut if that is taken for its end.
_NUM_SILENT = 3
_POLL_S = 5.0
_TIMEOUT_S = 5.0
# A proxy that the pod is told of, say to download weights, does not lead to the pod itself.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def read_metrics() -> str | None:
    """Text of this node's metrics; None where nothing answers."""
    try:
        with _DIRECT.open(METRICS_URL, timeout=_TIMEOUT_S) as answer:
            return str(answer.read().decode())
    except (OSError, HTTPException):
        return None


def num_open_requests(metrics: str) -> int:
    """Open requests on this node, of ingress and model replicas together."""
    values = [
        line.rpartition(" ")[2]
        for line in metrics.splitlines()
        if line.startswith((f"{OPEN_REQUESTS}{{", f"{OPEN_REQUESTS} "))
    ]
    return int(sum(float(value) for value in values))


def drain(
    read: Callable[[], str | None] = read_metrics, sleep: Callable[[float], None] = time.sleep
) -> str:
    """Wait until several figures in a row show no open request; says why it ended."""
    num_quiet = num_silent = 0
    sleep(_REPORT_S)
    while True:
        metrics = read()
        if metrics is None:
            num_silent += 1
        else:
            num_silent = 0
            num_quiet = 0 if num_open_requests(metrics) else num_quiet + 1
        if num_silent == _NUM_SILENT:
            return "Ray has stopped already"
        if num_quiet == _NUM_QUIET:
            return "no request is open"
        sleep(_POLL_S)


def main() -> None:
    print(f"drain: {drain()}", file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    main()
