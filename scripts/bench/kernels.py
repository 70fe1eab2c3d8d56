"""Share of the machine's limit that each CPU kernel reaches: `python -m scripts.bench.kernels`.

Every kernel of the 0.5B's shape by itself, its weights or cache cold as in a step. A kernel's limit
is the longer of its bytes at the measured bandwidth and its operations at the measured peak. What a
step has in the CPU's caches (norm, sampling, what ranks exchange) is told in microseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.plan.shapes import published_shape
from scripts.bench.all_reduce_times import all_reduce_cases
from scripts.bench.kernel_cases import (
    LINEAR_ROWS,
    Case,
    attention_cases,
    linear_cases,
    norm_cases,
    sampling_cases,
)
from scripts.bench.plot_style import LIMIT, OURS, new_figure, save
from scripts.bench.probes import Limits, Probes, num_cores
from scripts.bench.shoal_run import machine, write_results
from serve.catalog import ModelShape
from serve.kernels.native import Pool, load, reason

MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
_MIN_CALLS = 5
_PANELS = ("qkv", "output", "gate_up", "down", "head")


def time_case(case: Case, seconds: float) -> float:
    """Median seconds of a call, over about `seconds` of calls."""
    case.call()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < _MIN_CALLS or time.perf_counter() < until:
        began = time.perf_counter()
        case.call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def cases(pool: Pool, shape: ModelShape, *, is_quick: bool) -> Iterator[Case]:
    """All kernels at all sizes."""
    yield from linear_cases(pool, shape, rows=(1, 16) if is_quick else LINEAR_ROWS)
    yield from attention_cases(pool, shape)
    yield from norm_cases(pool, shape)
    yield from sampling_cases(pool, shape)


def measure(case: Case, limits: Limits, seconds: float) -> dict[str, Any]:
    """One row of the table."""
    took_s = time_case(case, seconds)
    read_s = case.num_bytes / limits.read_bytes_per_s
    compute_s = case.num_operations / limits.flops
    return {
        "kernel": case.kernel,
        "size": case.size,
        "us": took_s * 1e6,
        "gb_s": case.num_bytes / took_s / 1e9,
        "gflop_s": case.num_operations / took_s / 1e9,
        "limit_us": max(read_s, compute_s) * 1e6,
        "bound_by": "memory" if read_s >= compute_s else "arithmetic",
        "share": max(read_s, compute_s) / took_s if case.is_cold else None,
    }


def show(row: dict[str, Any]) -> None:
    """A line of the table, as soon as it is known."""
    share = "- |" if row["share"] is None else f"{row['bound_by']} | {row['share']:.2f} |"
    print(
        f"| {row['kernel']} | {row['size']} | {row['us']:.0f} | {row['gb_s']:.1f}"
        f" | {row['gflop_s']:.0f} | {share}",
        flush=True,
    )


def plot(path: Path) -> Path:
    """Shares of the limit for products and attention, microseconds for what is in caches."""
    content = json.loads(path.read_text())
    rows = content["rows"]
    figure, (left, middle, right) = new_figure(3, width=17, height=5)
    for kernel in _PANELS:
        found = [row for row in rows if row["kernel"] == kernel]
        sizes = [row["size"].split()[0] for row in found]
        left.plot(sizes, [row["share"] for row in found], marker="o", label=kernel)
    left.set_title("Packed linear: share of the limit", fontsize=11)
    left.set_xlabel("rows")
    left.axhline(1.0, color=LIMIT, linestyle="--")
    left.set_ylim(0, 1.25)
    left.legend(frameon=False)
    attention = [row for row in rows if row["kernel"].startswith("attention")]
    _draw_bars(middle, attention, "share", "%.2f")
    middle.set_title("Attention: share of the limit, sequences x context", fontsize=11)
    middle.axvline(1.0, color=LIMIT, linestyle="--")
    others = [row for row in rows if row["share"] is None] + content["meetings"]
    _draw_bars(right, others, "us", "%.0f")
    right.set_title("In the CPU's caches: microseconds", fontsize=11)
    right.set_xscale("log")
    return save(figure, path)


def _draw_bars(axes: Any, rows: list[dict[str, Any]], figure: str, form: str) -> None:
    names = [f"{row['kernel'].removeprefix('attention, ')}, {row['size']}" for row in rows[::-1]]
    drawn = axes.barh(names, [row[figure] for row in rows[::-1]], color=OURS)
    axes.bar_label(drawn, fmt=form, padding=3, fontsize=8)
    axes.tick_params(axis="y", labelsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--seconds", type=float, default=0.5, help="spent on each row")
    parser.add_argument("--quick", action="store_true", help="few rows, short")
    arguments = parser.parse_args()
    seconds = 0.05 if arguments.quick else arguments.seconds
    library = load()
    if library is None:
        raise SystemExit(f"nothing to measure: {reason()}")
    shape = published_shape(MODEL)
    assert shape is not None, "the catalogue has it"
    print(f"machine: {machine()}; kernels: {library.isa}")
    with Probes(arguments.threads) as probes:
        limits = probes.burst()
        print(f"{probes}: {limits}")
    print("\n| kernel | size | us | GB/s | GFLOP/s | bound by | share of limit |")
    print("|---|---|---:|---:|---:|---|---:|")
    rows = []
    for case in cases(library.pool(arguments.threads), shape, is_quick=arguments.quick):
        rows.append(measure(case, limits, seconds))
        show(rows[-1])
    meetings = all_reduce_cases(library, shape, size=arguments.threads)
    for row in meetings:
        print(f"| {row['kernel']} | {row['size']} | {row['us']:.1f} | - | - | latency | - |")
    content = {"isa": library.isa, "limits": asdict(limits), "rows": rows, "meetings": meetings}
    path = write_results("kernels-quick" if arguments.quick else "kernels", content)
    print("written:", path, plot(path))


if __name__ == "__main__":
    main()
