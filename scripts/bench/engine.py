"""Ours and every peer that is installed, on one model, in turn: `python -m scripts.bench.engine`.

Rounds of every engine at every workload, each frozen while others work. Every round is held against
the machine twice: its burst, the best of several passes of a probe just before (the issue's limit),
and what the same probe sustains for some seconds before and after each of our engines.

A peer needs a virtual environment of its own in `--peers` (`llama`, `vllm`, see
`scripts/bench/peers`); transformers runs in this one. What is not there, or fails, is listed as not
run, and no bar is claimed against it. The best dtype of a peer counts, whatever it is. One short
round warms up and counts for nobody; a peer that it shows far behind the best is not asked again.

    --quick            two layers, few tokens: does everything work? (5 minutes)
    --rounds N         rounds after the warm-up (5: about 30 minutes on 2 cores)
    --only KEY ...     these engines alone, by the names that the first lines print
    --compare-plan     hold `shoal plan`'s prediction against what was measured
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from scripts.bench.checkpoint import bench_checkpoint, cache_folder
from scripts.bench.contender import ContenderSpec
from scripts.bench.engine_plot import plot_engines
from scripts.bench.engine_report import (
    find_bars,
    find_limits,
    find_shares,
    results,
    show,
    show_bars,
    show_shares,
)
from scripts.bench.engine_rounds import measure, start
from scripts.bench.plan_speed import compare_plan
from scripts.bench.probes import Probes, num_cores
from scripts.bench.shoal_run import machine, write_results
from scripts.bench.workloads import workloads
from serve.checkpoint import inspect_checkpoint

_PEERS = (
    ("llama", "llama_cpp", ("bfloat16", "float16")),
    ("vllm", "vllm_cpu", ("bfloat16", "float32")),
)
_OWN_PEER = ("transformers", "torch_eager", ("bfloat16", "float32"))
_MODULES = "scripts.bench.peers"


def specs(folder: Path, peers: Path, num_threads: int) -> list[ContenderSpec]:
    """Ours, then every peer whose Python is there."""
    python = Path(sys.executable)
    ours = [(1, num_threads)] + ([(2, num_threads // 2)] if num_threads > 1 else [])
    found = [
        ContenderSpec(
            f"shoal-tp{ranks}",
            python,
            f"{_MODULES}.shoal",
            (str(folder), str(threads), "bfloat16", str(ranks)),
            is_ours=True,
        )
        for ranks, threads in ours
    ]
    for name, module, dtypes in (*_PEERS, _OWN_PEER):
        own = python if name == _OWN_PEER[0] else peers / name / "bin" / "python"
        if not own.exists():
            print(f"not run: {name} (no {own})")
            continue
        found += [
            ContenderSpec(
                f"{name}-{dtype}",
                own,
                f"{_MODULES}.{module}",
                (str(folder), str(num_threads), dtype),
            )
            for dtype in dtypes
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="KEY")
    parser.add_argument("--peers", type=Path, default=cache_folder() / "peers")
    parser.add_argument("--compare-plan", action="store_true")
    arguments = parser.parse_args()
    num_threads = num_cores()
    folder = bench_checkpoint("short" if arguments.quick else "0.5b")
    shape = inspect_checkpoint(folder).shape
    asked = workloads(is_quick=arguments.quick)
    wanted = specs(folder, arguments.peers, num_threads)
    if arguments.only:
        wanted = [spec for spec in wanted if spec.key in arguments.only]
    print(f"machine: {machine()}")
    with tempfile.TemporaryDirectory() as logs, Probes(num_threads) as probes:
        print(f"limits of {probes}: {probes.burst()}", flush=True)
        running, failed = start(wanted, Path(logs))
        try:
            measured = measure(running, asked, probes, num_rounds=arguments.rounds)
        finally:
            for contender in running:
                contender.close()
    limits = find_limits(measured, asked, shape)
    found, shares = find_bars(measured, asked, limits), find_shares(measured, asked, limits)
    show(measured, asked, limits)
    show_shares(shares)
    show_bars(found)
    content = results(measured, limits, running, failed)
    content["shares"] = shares
    content["bars"] = [asdict(bar) | {"verdict": bar.verdict} for bar in found]
    if arguments.compare_plan:
        content["plan"] = compare_plan(shape, asked, content["tokens_per_s"], measured.devices)
    path = write_results("engine-quick" if arguments.quick else "engine", content)
    print("written:", path, plot_engines(path))


if __name__ == "__main__":
    main()
