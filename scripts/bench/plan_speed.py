"""`shoal plan`'s prediction for this machine, beside what was measured on it.

The planner measures the CPU by itself, as it does for a user, beside every round; nothing of the
run is told to it. `python -m scripts.bench.plan_speed` compares the last run of
`scripts.bench.engine` once more, after a change of the planner's shares.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.planner.hardware import cpu_device
from cluster.planner.machine import Machine
from cluster.planner.prediction import measured_cpu
from cluster.planner.speed import CPU_CALIBRATION, Device, Roofline
from scripts.bench.checkpoint import bench_checkpoint
from scripts.bench.workloads import Workload, workloads
from serve.catalog import ModelShape
from serve.checkpoint import inspect_checkpoint
from serve.config import EngineConfig

BAR = 0.2
OURS = "shoal-tp"
Rounds = Mapping[str, Mapping[str, Mapping[int, float]]]  # tokens a second: workload, engine, round


def plan_device() -> Device:
    """This machine as `shoal plan` sees it now; about 0.3 s."""
    return measured_cpu(Machine.detect())


def compare_plan(
    shape: ModelShape, asked: list[Workload], rounds: Rounds, devices: Mapping[int, Device]
) -> list[dict[str, Any]]:
    """Print and return predicted and measured figures of our engines, medians over rounds."""
    rows = [
        _compare(shape, workload, key, by_round, devices)
        for workload in asked
        for key, by_round in rounds.get(workload.name, {}).items()
        if key.startswith(OURS)
    ]
    print("\n| workload | engine | plan, tok/s | measured | error |\n|---|---|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['workload']} | {row['engine']} | {row['predicted']:.1f}"
            f" | {row['measured']:.1f} | {row['error']:+.0%} |"
        )
    bandwidth = statistics.median(one.bandwidth_bytes_per_s for one in devices.values())
    flops = statistics.median(one.flops_per_s for one in devices.values())
    largest = max((abs(row["error"]) for row in rows), default=0.0)
    print(
        f"the planner's own measure: {bandwidth / 1e9:.1f} GB/s, {flops / 1e9:.0f} GFLOP/s; the bar"
        f" is {BAR:.0%}, the largest error {largest:.0%}"
    )
    _show_shares(shape, asked, rounds, devices)
    return rows


def _compare(
    shape: ModelShape,
    workload: Workload,
    key: str,
    by_round: Mapping[int, float],
    devices: Mapping[int, Device],
) -> dict[str, Any]:
    token_budget = EngineConfig().token_budget
    pairs = []
    for number, speed in by_round.items():
        roofline = Roofline(shape, int(key.removeprefix(OURS)), devices[number])
        predicted = workload.predicted_tokens_per_s(roofline, token_budget=token_budget)
        pairs.append((predicted, speed))
    return {
        "workload": workload.name,
        "engine": key,
        "predicted": statistics.median(predicted for predicted, _ in pairs),
        "measured": statistics.median(speed for _, speed in pairs),
        "error": statistics.median(predicted / speed for predicted, speed in pairs) - 1,
    }


def _show_shares(
    shape: ModelShape, asked: list[Workload], rounds: Rounds, devices: Mapping[int, Device]
) -> None:
    """What of the planner's measure our one-rank engine reached: what the shares could be."""
    ideal = shape.num_params * 2
    for workload in asked:
        by_round = rounds.get(workload.name, {}).get(f"{OURS}1", {})
        if not by_round:
            continue
        bandwidth = statistics.median(
            speed / workload.batch * ideal / devices[number].bandwidth_bytes_per_s
            for number, speed in by_round.items()
        )
        flops = statistics.median(
            2 * shape.num_non_embedding_params * speed / devices[number].flops_per_s
            for number, speed in by_round.items()
        )
        read = "" if workload.is_prefill else f"{bandwidth:.2f} of the bandwidth, "
        print(f"  reached, {workload.name}: {read}{flops:.2f} of the arithmetic")
    used = CPU_CALIBRATION
    print(f"  used: {used.bandwidth_share} of the bandwidth, {used.flops_share} of the arithmetic")


def main() -> None:
    content = json.loads(Path("bench-results/engine.json").read_text())
    rounds = {
        name: {
            key: {int(number): speed for number, speed in by_round.items()}
            for key, by_round in engines.items()
        }
        for name, engines in content["tokens_per_s"].items()
    }
    devices = {
        int(number): cpu_device(bandwidth_bytes_per_s=bandwidth, flops_per_s=flops)
        for number, (bandwidth, flops) in content["plan_measures"].items()
    }
    shape = inspect_checkpoint(bench_checkpoint("0.5b")).shape
    compare_plan(shape, workloads(is_quick=False), rounds, devices)


if __name__ == "__main__":
    main()
