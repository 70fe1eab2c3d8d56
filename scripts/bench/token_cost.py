"""What a streamed token costs in CPU, over all server processes, beside one bare uvicorn process.

    python -m scripts.bench.token_cost [--rounds N] [--tokens N]

A step of 20 ms stands in for the model, so that only the path of a token is measured. Ray's
background, which burns the same whatever the load, is measured first and shown apart. TTFT is
measured with steps of no length at 1 client. Serve's own counters, before and after a stream of
1,000 tokens, tell how many Serve calls those tokens made.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

from scripts.bench.shoal_run import (
    ShoalRun,
    cpu_seconds,
    free_port,
    machine,
    run_shoal,
    write_results,
)
from scripts.bench.streams import StreamResult, run_streams

STEP_MS = 20
NUM_STREAMS = (1, 32, 128)
NUM_TTFT_REQUESTS = 60
COUNTER_WAIT_S = 15.0
MODELS = """\
  - {preset: demo, name: paced, is_default: true, tensor_parallel: 1, longest_generation_s: 5,
      stand_in: {step_ms: 20}, engine: {max_running_sequences: 256, kv_cache_tokens: 524288}}
  - {preset: demo, name: instant, tensor_parallel: 1, longest_generation_s: 5,
      stand_in: {step_ms: 0}, engine: {max_running_sequences: 256, kv_cache_tokens: 524288}}
"""


class _Bare:
    """The bare server as a child process."""

    def __init__(self, step_ms: int) -> None:
        self.port = free_port()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "scripts.bench.bare_server", str(self.port), str(step_ms)]
        )
        self.processes = [psutil.Process(self._process.pid)]

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


def _wait(seconds: float) -> None:
    threading.Event().wait(seconds)


def _idle_cores(run: ShoalRun, seconds: float) -> float:
    """Cores that the processes of an idle Shoal use."""
    before, began = cpu_seconds(run.processes()), time.monotonic()
    _wait(seconds)
    after = cpu_seconds(run.processes())
    return _spent(before, after) / (time.monotonic() - began)


def _spent(before: dict[int, tuple[str, float]], after: dict[int, tuple[str, float]]) -> float:
    return sum(used - before.get(pid, ("", 0.0))[1] for pid, (_, used) in after.items())


def _by_name(
    before: dict[int, tuple[str, float]], after: dict[int, tuple[str, float]], num_tokens: int
) -> dict[str, float]:
    total: dict[str, float] = {}
    for pid, (name, used) in after.items():
        total[name] = total.get(name, 0.0) + used - before.get(pid, ("", 0.0))[1]
    microseconds = {name: seconds / num_tokens * 1e6 for name, seconds in total.items()}
    return dict(sorted(microseconds.items(), key=lambda item: -item[1])[:6])


def _measure(
    port: int,
    processes: Callable[[], list[psutil.Process]],
    *,
    num_streams: int,
    num_tokens: int,
    idle_cores: float,
) -> dict[str, Any]:
    """CPU per token of one run of streams; `net` leaves the idle background out."""
    asyncio.run(run_streams(port, num_streams=num_streams, num_tokens=5))
    before, began = cpu_seconds(processes()), time.monotonic()
    results = asyncio.run(run_streams(port, num_streams=num_streams, num_tokens=num_tokens))
    elapsed_s = time.monotonic() - began
    after = cpu_seconds(processes())
    assert all(result.is_done for result in results), "a stream did not end"
    num_all = sum(result.num_events for result in results)
    spent_s = _spent(before, after)
    return {
        "gross_us": spent_s / num_all * 1e6,
        "net_us": (spent_s - idle_cores * elapsed_s) / num_all * 1e6,
        "by_process_us": _by_name(before, after, num_all),
        "num_events": num_all,
        "elapsed_s": elapsed_s,
    }


def _ttft_ms(port: int, model: str) -> float:
    """Median time to the first event, one client after the other."""

    async def once() -> StreamResult:
        return (await run_streams(port, num_streams=1, num_tokens=2, model=model))[0]

    async def all_of_them() -> list[float]:
        return [(await once()).first_event_s for _ in range(NUM_TTFT_REQUESTS)]

    return statistics.median(asyncio.run(all_of_them())) * 1e3


def _serve_calls(run: ShoalRun, num_tokens: int) -> dict[str, float]:
    """What Serve's counters gained over one stream of `num_tokens` tokens."""
    _wait(COUNTER_WAIT_S)
    before = run.serve_counters()
    result = asyncio.run(run_streams(run.port, num_streams=1, num_tokens=num_tokens))[0]
    assert result.is_done
    _wait(COUNTER_WAIT_S)
    after = run.serve_counters()
    return {key: after[key] - before.get(key, 0.0) for key in sorted(after)}


def _measure_costs(run: ShoalRun, *, idle_cores: float, rounds: int, tokens: int) -> dict[str, Any]:
    bare = _Bare(STEP_MS)
    try:
        _wait(3.0)
        costs: dict[str, Any] = {}
        for num_streams in NUM_STREAMS:
            pairs = []
            for _ in range(rounds):
                floor = _measure(
                    bare.port,
                    lambda: bare.processes,
                    num_streams=num_streams,
                    num_tokens=tokens,
                    idle_cores=0.0,
                )
                ours = _measure(
                    run.port,
                    run.processes,
                    num_streams=num_streams,
                    num_tokens=tokens,
                    idle_cores=idle_cores,
                )
                pairs.append({"bare": floor, "shoal": ours})
            costs[str(num_streams)] = {
                "bare_us": statistics.median(pair["bare"]["gross_us"] for pair in pairs),
                "shoal_gross_us": statistics.median(pair["shoal"]["gross_us"] for pair in pairs),
                "shoal_net_us": statistics.median(pair["shoal"]["net_us"] for pair in pairs),
                "ratio_net": statistics.median(
                    pair["shoal"]["net_us"] / pair["bare"]["net_us"] for pair in pairs
                ),
                "rounds": pairs,
            }
        return costs
    finally:
        bare.stop()


def _measure_ttft(run: ShoalRun) -> dict[str, float]:
    bare = _Bare(0)
    try:
        _wait(3.0)
        rounds = [(_ttft_ms(bare.port, "instant"), _ttft_ms(run.port, "instant")) for _ in range(3)]
    finally:
        bare.stop()
    floor, ours = (statistics.median(values) for values in zip(*rounds, strict=True))
    return {"bare_ms": floor, "shoal_ms": ours, "over_ms": ours - floor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=500)
    arguments = parser.parse_args()
    with run_shoal(f"bench-{free_port()}", MODELS) as run:
        _wait(10.0)
        idle_cores = _idle_cores(run, 15.0)
        ttft = _measure_ttft(run)
        calls = _serve_calls(run, 1000)
        costs = _measure_costs(
            run, idle_cores=idle_cores, rounds=arguments.rounds, tokens=arguments.tokens
        )
    print(f"machine: {machine()}")
    print(f"idle background of all processes: {idle_cores:.3f} cores")
    print(
        f"{'streams':>8} {'bare us':>9} {'shoal us':>9} {'+ idle us':>9} {'ratio':>7}  (limit 3.5)"
    )
    for num_streams, cost in costs.items():
        print(
            f"{num_streams:>8} {cost['bare_us']:9.1f} {cost['shoal_net_us']:9.1f}"
            f" {cost['shoal_gross_us'] - cost['shoal_net_us']:9.1f} {cost['ratio_net']:7.2f}"
        )
        for name, used in cost["rounds"][-1]["shoal"]["by_process_us"].items():
            print(f"{'':>10}{used:7.1f} us  {name}")
    print(
        f"TTFT p50, 1 client: bare {ttft['bare_ms']:.2f} ms, shoal {ttft['shoal_ms']:.2f} ms,"
        f" over {ttft['over_ms']:.2f} ms (limit 4)"
    )
    print("Serve calls over a stream of 1,000 tokens:", calls)
    results = {"idle_cores": idle_cores, "costs": costs, "ttft": ttft, "serve_calls": calls}
    print("written:", write_results("token_cost", results))


if __name__ == "__main__":
    main()
