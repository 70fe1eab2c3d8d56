"""How long it takes from `shoal up` to the first token of an answer, and what memory it holds.

    python -m scripts.bench.startup [--rounds N]

The demo model with two shards, HAProxy and the dashboard included, as a user starts it. Phases are
those that the command prints; the first token is the first character of the answer on its output.
Memory is the proportional set size of every process, once the answer is there.
"""

from __future__ import annotations

import argparse
import re
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

from cluster.local.folder import runs_path
from scripts.bench.shoal_run import ShoalRun, free_port, machine, memory_bytes, write_results

LIMIT_S = 15.0
_PHASE = re.compile(r"^(Ray|Serve|Weights|Warm-up|Ready)\s+([0-9.]+) s")


def _start_once() -> dict[str, Any]:
    """One start: seconds of each phase and to the first token, bytes by process."""
    name, port = f"bench-{free_port()}", free_port()
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster", "up", "--ask", "--name", name, "--port", str(port)],
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert process.stdout is not None
    phases: dict[str, float] = {}
    try:
        for line in process.stdout:
            if found := _PHASE.match(line):
                phases[found[1]] = float(found[2])
            if line.startswith("You"):
                break
        assert process.stdout.read(len("Shoal  ") + 1), "no answer came"
        first_token_s = time.monotonic() - began
        run = ShoalRun(name, port, runs_path() / name)
        while "API and page" not in (line := process.stdout.readline()):
            assert line, "the command ended before it said where it serves"
        memory = memory_bytes(run.processes())
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    return {"phases_s": phases, "first_token_s": first_token_s, "memory_bytes": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = [_start_once() for _ in range(parser.parse_args().rounds)]
    print(f"machine: {machine()}")
    for phase in rounds[0]["phases_s"]:
        values = sorted(one["phases_s"].get(phase, 0.0) for one in rounds)
        print(
            f"{phase:<12} {statistics.median(values):6.1f} s  ({values[0]:.1f} to {values[-1]:.1f})"
        )
    values = sorted(one["first_token_s"] for one in rounds)
    median_s = statistics.median(values)
    print(
        f"{'First token':<12} {median_s:6.1f} s  ({values[0]:.1f} to {values[-1]:.1f}),"
        f" limit {LIMIT_S:g} s"
    )
    memory = rounds[-1]["memory_bytes"]
    for name, size in sorted(memory.items(), key=lambda item: -item[1])[:8]:
        print(f"{name:<28} {size / 2**20:8.0f} MiB")
    print(f"{'all processes':<28} {sum(memory.values()) / 2**20:8.0f} MiB")
    print("written:", write_results("startup", {"rounds": rounds, "median_s": median_s}))


if __name__ == "__main__":
    main()
