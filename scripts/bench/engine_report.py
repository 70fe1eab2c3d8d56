"""What the rounds of `scripts.bench.engine` say: a table of speeds, bars met or missed, JSON."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

from scripts.bench.bars import Bar, Speeds, limit_bar, pair_bar, peer_bar
from scripts.bench.contender import Contender
from scripts.bench.engine_rounds import Measured
from scripts.bench.workloads import Workload
from serve.catalog import ModelShape

RoundLimits = dict[str, dict[int, float]]  # tokens a second, by workload and round


def find_bars(measured: Measured, asked: list[Workload], limits: RoundLimits) -> list[Bar]:
    """The issue's bars that were measured."""
    one, four, sixteen, prefill, long = (workload.name for workload in asked)
    tables = {name: measured.table(name) for name in (one, four, sixteen, prefill)}
    own = {name: measured.tables.get(name, {}) for name in (one, sixteen, long)}
    found = [
        limit_bar(one, own[one], limits[one], 0.95),
        limit_bar(long, own[long], limits[long], 0.8),
        pair_bar(sixteen, own[sixteen], "shoal-tp2", "shoal-tp1", 1.0),
    ]
    for name, least in ((one, 0.97), (four, 1.5), (sixteen, 1.3), (prefill, 1.0)):
        found.append(peer_bar(name, tables[name], least))
        same = {key: speeds for key, speeds in tables[name].items() if _is_bfloat16(key, speeds)}
        found.append(peer_bar(f"{name}, bfloat16 only", same, least))
    return found


def _is_bfloat16(key: str, speeds: Speeds) -> bool:
    return speeds.is_ours or key.endswith("bfloat16")


def show(measured: Measured, asked: list[Workload], limits: RoundLimits) -> None:
    """A table: engines down, workloads across."""
    tables = {workload.name: measured.table(workload.name) for workload in asked}
    engines = list(dict.fromkeys(key for table in tables.values() for key in table))
    print("\ntok/s, medians; in brackets one short run only\n")
    print("| engine | " + " | ".join(tables) + " |")
    print("|---|" + "---:|" * len(tables))
    for key in engines:
        cells = [_cell(measured, name, tables[name].get(key), key) for name in tables]
        print(f"| {key} | " + " | ".join(cells) + " |")
    cells = [f"{statistics.median(limits[name].values()):.1f}" for name in tables]
    print("| the machine's limit | " + " | ".join(cells) + " |")
    cells = [f"{max(limits[name].values()):.1f}" for name in tables]
    print("| its best in the run | " + " | ".join(cells) + " |")


def _cell(measured: Measured, name: str, speeds: Speeds | None, key: str) -> str:
    if speeds is None:
        return "-"
    is_measured = key in measured.tables.get(name, {})
    return f"{speeds.median:.1f}" if is_measured else f"({speeds.median:.1f})"


def show_bars(found: list[Bar]) -> None:
    """A line a bar."""
    print("\n| bar | at least | reached | | |\n|---|---:|---:|---|---|")
    for bar in found:
        reached = "-" if bar.reached is None else f"{bar.reached:.3f}"
        print(f"| {bar.name} | {bar.least:g} | {reached} | {bar.verdict} | {bar.against} |")


def round_limits(measured: Measured, asked: list[Workload], shape: ModelShape) -> RoundLimits:
    """Each workload's limit in each round, in tokens a second."""
    return {
        workload.name: {
            number: workload.limit_tokens_per_s(shape, limits)
            for number, limits in measured.limits.get(workload.name, {}).items()
        }
        for workload in asked
    }


def results(
    measured: Measured,
    limits: RoundLimits,
    found: list[Bar],
    running: list[Contender],
    failed: dict[str, str],
) -> dict[str, Any]:
    """What is written down: facts of the engines, every round, and the bars."""
    return {
        "engines": {one.spec.key: asdict(one.facts) for one in running},
        "not_run": failed,
        "probes": {
            name: {number: asdict(one) for number, one in by_round.items()}
            for name, by_round in measured.limits.items()
        },
        "limits_tokens_per_s": limits,
        "tokens_per_s": {
            name: {key: speeds.by_round for key, speeds in table.items()}
            for name, table in measured.tables.items()
        },
        "warm_up_tokens_per_s": {
            name: {key: speeds.median for key, speeds in table.items()}
            for name, table in measured.warm_ups.items()
        },
        "cpu_ms_per_token": measured.cpu_ms,
        "plan_measures": {
            number: (device.bandwidth_bytes_per_s, device.flops_per_s)
            for number, device in measured.devices.items()
        },
        "bars": [asdict(bar) | {"verdict": bar.verdict} for bar in found],
    }
