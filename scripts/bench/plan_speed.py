"""`shoal plan`'s prediction for this machine, beside what was measured on it.

The planner measures the CPU by itself, as it does for a user; nothing here is told to it.
"""

from __future__ import annotations

from typing import Any

from cluster.planner.machine import Machine
from cluster.planner.prediction import measured_cpu
from cluster.planner.speed import Roofline
from scripts.bench.bars import Table
from scripts.bench.workloads import Workload
from serve.catalog import ModelShape
from serve.config import EngineConfig

BAR = 0.2


def compare_plan(
    shape: ModelShape, asked: list[Workload], tables: dict[str, Table]
) -> list[dict[str, Any]]:
    """Print and return predicted, measured and their ratio for each of our engines' figures."""
    device = measured_cpu(Machine.detect())
    token_budget = EngineConfig().token_budget
    rows = []
    for workload in asked:
        for key, speeds in tables.get(workload.name, {}).items():
            if not speeds.is_ours:
                continue
            roofline = Roofline(shape, int(key.rpartition("tp")[2]), device)
            predicted = workload.predicted_tokens_per_s(roofline, token_budget=token_budget)
            rows.append(
                {
                    "workload": workload.name,
                    "engine": key,
                    "predicted": predicted,
                    "measured": speeds.median,
                    "error": predicted / speeds.median - 1,
                }
            )
    print("\n| workload | engine | plan, tok/s | measured | error |\n|---|---|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['workload']} | {row['engine']} | {row['predicted']:.1f}"
            f" | {row['measured']:.1f} | {row['error']:+.0%} |"
        )
    print(
        f"bandwidth {device.bandwidth_bytes_per_s / 1e9:.1f} GB/s,"
        f" {device.flops_per_s / 1e9:.0f} GFLOP/s by the planner's own measure; the bar is"
        f" {BAR:.0%}"
    )
    return rows
