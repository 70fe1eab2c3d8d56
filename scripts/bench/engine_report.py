"""What the rounds of `scripts.bench.engine` say: speeds, shares of both limits, bars, JSON.

A share of the burst compares with the best moment that the machine had just before; a share of what
it sustained, with its seconds around ours. On a machine of its own the two are equal.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from scripts.bench.bars import Bar, Speeds, limit_bar, pair_bar, peer_bar, ratio
from scripts.bench.contender import Contender
from scripts.bench.engine_rounds import Measured
from scripts.bench.probes import Limits
from scripts.bench.workloads import Workload
from serve.catalog import ModelShape


@dataclass(frozen=True, slots=True)
class RoundLimits:
    """Tokens a second that the machine allows, by workload and round.

    `sustained` is by workload, engine of ours, and round.
    """

    burst: dict[str, dict[int, float]]
    sustained: dict[str, dict[str, dict[int, float]]]


def find_limits(measured: Measured, asked: list[Workload], shape: ModelShape) -> RoundLimits:
    """What the probes' figures mean for each workload."""

    def in_tokens(workload: Workload, by_round: Mapping[int, Limits]) -> dict[int, float]:
        return {
            number: workload.limit_tokens_per_s(shape, limits)
            for number, limits in by_round.items()
        }

    return RoundLimits(
        burst={one.name: in_tokens(one, measured.bursts.get(one.name, {})) for one in asked},
        sustained={
            one.name: {
                key: in_tokens(one, by_round)
                for key, by_round in measured.sustained.get(one.name, {}).items()
            }
            for one in asked
        },
    )


def find_bars(measured: Measured, asked: list[Workload], limits: RoundLimits) -> list[Bar]:
    """The issue's bars that were measured."""
    one, four, sixteen, prefill, long = (workload.name for workload in asked)
    tables = {name: measured.table(name) for name in (one, four, sixteen, prefill)}
    own = {name: measured.tables.get(name, {}) for name in (one, sixteen, long)}
    found = [
        limit_bar(one, own[one], limits.burst[one], 0.95),
        limit_bar(long, own[long], limits.burst[long], 0.8),
        pair_bar(sixteen, own[sixteen], "shoal-tp2", "shoal-tp1", 1.0),
    ]
    for name, least in ((one, 0.97), (four, 1.5), (sixteen, 1.3), (prefill, 1.0)):
        found.append(peer_bar(name, tables[name], least))
        same = {key: speeds for key, speeds in tables[name].items() if _is_bfloat16(key, speeds)}
        found.append(peer_bar(f"{name}, bfloat16 only", same, least))
    return found


def find_shares(
    measured: Measured, asked: list[Workload], limits: RoundLimits
) -> list[dict[str, Any]]:
    """What each of our engines reached of both limits: medians over rounds, ratios within each."""
    return [
        {
            "workload": workload.name,
            "engine": key,
            "tokens_per_s": speeds.median,
            "burst_tokens_per_s": statistics.median(burst.values()),
            "share_of_burst": ratio(speeds.by_round, burst),
            "sustained_tokens_per_s": statistics.median(sustained.values()),
            "share_of_sustained": ratio(speeds.by_round, sustained),
        }
        for workload in asked
        for key, speeds in measured.tables.get(workload.name, {}).items()
        if (burst := limits.burst[workload.name])
        and (sustained := limits.sustained[workload.name].get(key))
    ]


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
    for name, find in (("the burst limit", statistics.median), ("its best in the run", max)):
        cells = [f"{find(limits.burst[one].values()):.1f}" for one in tables]
        print(f"| {name} | " + " | ".join(cells) + " |")


def show_shares(shares: list[dict[str, Any]]) -> None:
    """A line for each of our engines at each workload."""
    print(
        "\nshares of the limit: the burst is the best pass of a probe just before, sustained the"
        " median pass of the seconds around ours\n"
    )
    print("| workload | engine | tok/s | burst | share | sustained | share |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for row in shares:
        print(
            f"| {row['workload']} | {row['engine']} | {row['tokens_per_s']:.1f}"
            f" | {row['burst_tokens_per_s']:.1f} | {row['share_of_burst']:.2f}"
            f" | {row['sustained_tokens_per_s']:.1f} | {row['share_of_sustained']:.2f} |"
        )


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


def results(
    measured: Measured,
    limits: RoundLimits,
    running: list[Contender],
    failed: dict[str, str],
) -> dict[str, Any]:
    """What is written down: facts of the engines, and every round."""
    return {
        "engines": {one.spec.key: asdict(one.facts) for one in running},
        "not_run": failed,
        "burst_probes": {
            name: {number: asdict(one) for number, one in by_round.items()}
            for name, by_round in measured.bursts.items()
        },
        "sustained_probes": {
            name: {
                key: {number: asdict(one) for number, one in by_round.items()}
                for key, by_round in by_engine.items()
            }
            for name, by_engine in measured.sustained.items()
        },
        "limits_tokens_per_s": limits.burst,
        "sustained_tokens_per_s": limits.sustained,
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
            name: {
                key: {
                    number: (device.bandwidth_bytes_per_s, device.flops_per_s)
                    for number, device in by_round.items()
                }
                for key, by_round in by_engine.items()
            }
            for name, by_engine in measured.devices.items()
        },
    }
