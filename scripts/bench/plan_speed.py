"""`shoal plan`'s prediction for this machine, what was measured on it, and the shares to use.

The planner measures the CPU by itself, as it does for a user, before and after each of our engines;
the mean of both counts, and nothing of the run is told to it. `python -m scripts.bench.plan_speed`
compares the last run of `scripts.bench.engine` once more, from its JSON and in some seconds, and
prints the shares that would have had the least largest error; several runs, if their files are
named, count together.

To refit: write those shares to `CPU_CALIBRATION` in `cluster/planner/speed.py` and run this again.
They come from the run that they are then held against; so it also says how far off a round is that
the fit has not seen, and the next run of the engines is the real test.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.planner.hardware import cpu_device
from cluster.planner.machine import Machine
from cluster.planner.prediction import measured_cpu
from cluster.planner.speed import CPU_CALIBRATION, Calibration, Device, Roofline
from scripts.bench.checkpoint import bench_checkpoint
from scripts.bench.workloads import Workload, workloads
from serve.catalog import ModelShape
from serve.checkpoint import inspect_checkpoint
from serve.config import EngineConfig

BAR = 0.2
OURS = "shoal-tp"
Rounds = Mapping[str, Mapping[str, Mapping[int, float]]]  # tokens a second: workload, engine, round
Devices = Mapping[str, Mapping[str, Mapping[int, Device]]]  # as the planner saw the machine then

# What is fitted, each between a least and a most; the grid closes in on the best point.
_RANGES = {
    "bandwidth_share": (0.4, 1.6),
    "flops_share": (0.6, 2.6),
    "attention_share": (0.1, 1.6),
    "exposed_share": (0.0, 1.0),
}
_GRID_POINTS = 5
_ZOOMS = 7
_ZOOM = 0.55


@dataclass(frozen=True, slots=True)
class Case:
    """One of our engines at one workload: speeds by round, and the machine beside each."""

    workload: Workload
    engine: str
    speeds: Mapping[int, float]
    rooflines: Mapping[int, Roofline]

    def predicted(self, number: int, calibration: Calibration) -> float:
        """Tokens a second that the plan expects in a round."""
        roofline = self.rooflines[number]
        device = replace(roofline.device, calibration=calibration)
        return self.workload.predicted_tokens_per_s(
            replace(roofline, device=device), token_budget=EngineConfig().budget("cpu")
        )

    def error(self, calibration: Calibration, numbers: frozenset[int]) -> float:
        """How far off, as a share of what was measured: the median of these rounds; -: too slow."""
        found = [
            self.predicted(number, calibration) / speed
            for number, speed in self.speeds.items()
            if number in numbers
        ]
        return statistics.median(found) - 1 if found else 0.0


def plan_device() -> Device:
    """This machine as `shoal plan` sees it now; about 0.8 s."""
    return measured_cpu(Machine.detect())


def mean_device(before: Device, after: Device) -> Device:
    """What the planner saw around something that took its time."""
    return replace(
        before,
        bandwidth_bytes_per_s=(before.bandwidth_bytes_per_s + after.bandwidth_bytes_per_s) / 2,
        flops_per_s=(before.flops_per_s + after.flops_per_s) / 2,
    )


def find_cases(
    shape: ModelShape, asked: list[Workload], rounds: Rounds, devices: Devices
) -> list[Case]:
    """Our engines' part of a run."""
    return [
        Case(
            workload,
            key,
            by_round,
            {
                number: Roofline(shape, int(key.removeprefix(OURS)), device)
                for number, device in devices[workload.name][key].items()
            },
        )
        for workload in asked
        for key, by_round in rounds.get(workload.name, {}).items()
        if key.startswith(OURS) and by_round
    ]


def largest_error(
    cases: list[Case], calibration: Calibration, numbers: frozenset[int] | None = None
) -> float:
    """The largest error of any case, whatever its sign; `numbers` are the rounds that count."""
    numbers = _all_rounds(cases) if numbers is None else numbers
    return max((abs(case.error(calibration, numbers)) for case in cases), default=0.0)


def fit(cases: list[Case], numbers: frozenset[int] | None = None) -> Calibration:
    """The shares with the least largest error, from a grid that closes in on the best point."""
    numbers = _all_rounds(cases) if numbers is None else numbers
    best, least = CPU_CALIBRATION, largest_error(cases, CPU_CALIBRATION, numbers)
    widths = {name: high - low for name, (low, high) in _RANGES.items()}
    centres = {name: (low + high) / 2 for name, (low, high) in _RANGES.items()}
    for _ in range(_ZOOMS):
        points = [_points(name, centres[name], widths[name]) for name in _RANGES]
        for values in itertools.product(*points):
            tried = replace(CPU_CALIBRATION, **dict(zip(_RANGES, values, strict=True)))
            error = largest_error(cases, tried, numbers)
            if error < least:
                best, least = tried, error
        centres = {name: getattr(best, name) for name in _RANGES}
        widths = {name: width * _ZOOM for name, width in widths.items()}
    return best


def _points(name: str, centre: float, width: float) -> list[float]:
    low, high = _RANGES[name]
    steps = range(_GRID_POINTS)
    found = (centre + width * (step / (_GRID_POINTS - 1) - 0.5) for step in steps)
    return sorted({min(max(point, low), high) for point in found})


def _all_rounds(cases: list[Case]) -> frozenset[int]:
    return frozenset(number for case in cases for number in case.speeds)


def compare_plan(
    shape: ModelShape, asked: list[Workload], rounds: Rounds, devices: Devices
) -> list[dict[str, Any]]:
    """Print and return predicted and measured figures of our engines, medians over rounds."""
    cases = find_cases(shape, asked, rounds, devices)
    fitted = fit(cases)
    rows = [_row(case, fitted) for case in cases]
    print("\n| workload | engine | plan, tok/s | measured | error | refitted |")
    print("|---|---|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['workload']} | {row['engine']} | {row['predicted']:.1f}"
            f" | {row['measured']:.1f} | {row['error']:+.0%} | {row['error_refitted']:+.0%} |"
        )
    seen = [line.device for case in cases for line in case.rooflines.values()]
    if not seen:
        return rows
    bandwidths = sorted(one.bandwidth_bytes_per_s / 1e9 for one in seen)
    flops = sorted(one.flops_per_s / 1e9 for one in seen)
    print(
        f"the planner's own measures: {bandwidths[0]:.1f} to {bandwidths[-1]:.1f} GB/s, median"
        f" {statistics.median(bandwidths):.1f}; {flops[0]:.0f} to {flops[-1]:.0f} GFLOP/s, median"
        f" {statistics.median(flops):.0f}"
    )
    used = largest_error(cases, CPU_CALIBRATION)
    print(f"the bar is {BAR:.0%}, the largest error {used:.0%}: {_text(CPU_CALIBRATION)}")
    print(f"refitted to this run {largest_error(cases, fitted):.0%}: {_text(fitted)}")
    _show_unseen(cases)
    return rows


def _row(case: Case, fitted: Calibration) -> dict[str, Any]:
    numbers = frozenset(case.speeds)
    predictions = [case.predicted(number, CPU_CALIBRATION) for number in numbers]
    return {
        "workload": case.workload.name,
        "engine": case.engine,
        "predicted": statistics.median(predictions),
        "measured": statistics.median(case.speeds.values()),
        "error": case.error(CPU_CALIBRATION, numbers),
        "error_refitted": case.error(fitted, numbers),
    }


def _show_unseen(cases: list[Case]) -> None:
    """Fit without a round, predict that round, for each in turn."""
    numbers = _all_rounds(cases)
    if len(numbers) < 2:
        return
    errors = [
        largest_error(cases, fit(cases, numbers - {number}), frozenset({number}))
        for number in sorted(numbers)
    ]
    text = ", ".join(f"{error:.0%}" for error in errors)
    print(f"each round predicted by shares that were fitted to the others, largest error: {text}")


def _text(calibration: Calibration) -> str:
    return ", ".join(f"{name}={getattr(calibration, name):.2f}" for name in _RANGES)


def _merged(runs: list[dict[str, Any]], name: str) -> dict[str, dict[str, dict[int, Any]]]:
    """A table of each run by workload, engine and round; rounds of the second begin at 100."""
    merged: dict[str, dict[str, dict[int, Any]]] = {}
    for place, content in enumerate(runs):
        for workload, engines in content[name].items():
            for key, by_round in engines.items():
                known = merged.setdefault(workload, {}).setdefault(key, {})
                known.update({100 * place + int(number): one for number, one in by_round.items()})
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, default=[Path("bench-results/engine.json")])
    runs = [json.loads(path.read_text()) for path in parser.parse_args().runs]
    devices = {
        workload: {
            key: {
                number: cpu_device(bandwidth_bytes_per_s=bandwidth, flops_per_s=flops)
                for number, (bandwidth, flops) in by_round.items()
            }
            for key, by_round in engines.items()
        }
        for workload, engines in _merged(runs, "plan_measures").items()
    }
    shape = inspect_checkpoint(bench_checkpoint("0.5b")).shape
    compare_plan(shape, workloads(is_quick=False), _merged(runs, "tokens_per_s"), devices)


if __name__ == "__main__":
    main()
