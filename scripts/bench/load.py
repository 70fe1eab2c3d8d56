"""How long a model takes to load, and how much memory: `python -m scripts.bench.load`.

Writes a random checkpoint of a published shape (7B: 15 GB), lets the page cache forget it, loads
it with the shards' own loading (tensor-parallel 2, one thread each, no Ray), answers one prompt,
and deletes it, also where it is ended by a signal. Held to the disk's and the memory's speed,
measured before. Memory is looked at from outside, ten times a second.

    --shape 0.5b    a quick run of 1 GB; then also from the page cache
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from scripts.bench.checkpoint import cache_folder
from scripts.bench.load_limits import LoadLimits, forget, let_go_of_memory, measure_limits
from scripts.bench.plot_style import LIMIT, OTHER, OURS, new_figure, save
from scripts.bench.random_checkpoint import num_checkpoint_bytes, write_random_checkpoint
from scripts.bench.shoal_run import machine, write_results

SHAPES = {"7b": "Qwen/Qwen2.5-7B-Instruct", "0.5b": "Qwen/Qwen2.5-0.5B-Instruct"}
BAR = 1.15  # resident memory over the weights
_PERIOD_S = 0.1
_PROMPT_TOKENS = 32
_ANSWER_TOKENS = 8
_KV_TOKENS = 4_096
_DISK_MARGIN = 1.05
_TIMEOUT_S = 1_200.0  # of one load
_MEMORY_MARGIN_BYTES = 2 << 30  # the ranks themselves, what they warm up with, and the KV cache
_SLOWEST, _FASTEST = 0.03e9, 0.2e9  # bytes a second, all in all
_BEGIN, _LOADED = "begin", "loaded"


@dataclass
class Sample:
    """Memory at one moment: resident bytes of each rank, of them private; the page cache's."""

    at_s: float
    resident: list[int]
    private: list[int]
    cached: int


@dataclass
class Observed:
    """One load as it was seen from outside, between the first piece of a weight and the last."""

    samples: list[Sample] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)


def observe(folder: Path, *, num_ranks: int, num_threads: int, kernels: str) -> Observed:
    """Load and answer in processes of their own; returns when they have ended."""
    command = [sys.executable, "-m", "scripts.bench.load", "--rank-0", str(folder)]
    command += ["--ranks", str(num_ranks), "--threads", str(num_threads), "--kernels", kernels]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    observed, is_over = Observed(), threading.Event()
    watch = threading.Thread(target=_watch, args=(process.pid, observed, is_over))
    watch.start()
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.strip() in (_BEGIN, _LOADED):
                observed.phases[line.strip()] = time.monotonic()
            elif line.startswith("{"):
                observed.result = json.loads(line)
    except BaseException:  # a signal: the ranks would go on, and need the files
        _end(process.pid)
        raise
    finally:
        is_over.set()
        watch.join()
    if process.wait() != 0:
        raise RuntimeError(f"rank 0 ended with {process.returncode}")
    return observed


def _end(pid: int) -> None:
    """Kill rank 0 and the ranks that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (*root.children(recursive=True), root):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _watch(pid: int, observed: Observed, is_over: threading.Event) -> None:
    root = psutil.Process(pid)
    deadline = time.monotonic() + _TIMEOUT_S
    while not is_over.wait(_PERIOD_S):
        if time.monotonic() > deadline:
            print(f"not done after {_TIMEOUT_S:.0f} s: killed", flush=True)
            _end(pid)
            return
        try:
            memory = [one.memory_info() for one in (root, *root.children(recursive=True))]
        except psutil.Error:
            continue
        observed.samples.append(
            Sample(
                time.monotonic(),
                [one.rss for one in memory],
                [one.rss - one.shared for one in memory],
                psutil.virtual_memory().cached,
            )
        )


def report(observed: Observed, limits: LoadLimits, num_bytes: int) -> dict[str, Any]:
    """The figures of one load."""
    began, loaded = observed.phases[_BEGIN], observed.phases[_LOADED]
    before = [one for one in observed.samples if one.at_s < began][-1]
    during = [one for one in observed.samples if one.at_s >= began]
    weights = observed.result["num_weight_bytes"]
    peak = max(sum(one.private) for one in during)
    return {
        **observed.result,
        "load_s": loaded - began,
        "bytes_per_s": num_bytes / (loaded - began),
        "disk_limit_s": limits.disk_s(num_bytes),
        "memory_limit_s": limits.memory_s(num_bytes),
        "peak_resident_bytes_by_rank": [
            max(one.resident[rank] for one in during if len(one.resident) > rank)
            for rank in range(len(weights))
        ],
        "peak_resident_bytes": max(sum(one.resident) for one in during),
        "peak_private_bytes": peak,
        "private_bytes_before": sum(before.private),
        "memory_ratio": (peak - sum(before.private)) / sum(weights),
        "page_cache_growth_bytes": max(one.cached for one in during) - before.cached,
        "samples": [asdict(one) | {"at_s": one.at_s - began} for one in observed.samples],
    }


def show(name: str, figures: dict[str, Any]) -> None:
    """One load in some lines."""
    by_rank = ", ".join(f"{size / 1e9:.2f}" for size in figures["peak_resident_bytes_by_rank"])
    print(
        f"{name}: {figures['load_s']:.1f} s, {figures['bytes_per_s'] / 1e9:.2f} GB/s"
        f" (limits: disk {figures['disk_limit_s']:.1f} s, memory {figures['memory_limit_s']:.1f} s)"
        f"\n  peak resident GB by rank {by_rank}; private of all"
        f" {figures['peak_private_bytes'] / 1e9:.2f}, {figures['memory_ratio']:.3f} x the weights"
        f" (bar {BAR}); page cache grew by {figures['page_cache_growth_bytes'] / 1e9:.2f} GB"
        f"\n  kernels {figures['kernels']}; answer {figures['answer']},"
        f" {figures['answer_s']:.2f} s after the load"
    )


def plot(path: Path, loads: dict[str, dict[str, Any]]) -> Path:
    """Time against its limits, and memory over time."""
    figure, (bars, memory) = new_figure(2, width=11, height=4)
    for at, (name, figures) in enumerate(loads.items()):
        limit = figures["memory_limit_s"]
        if name == "disk":
            limit = max(limit, figures["disk_limit_s"])
        drawn = bars.barh(at, figures["load_s"], height=0.5, color=OURS)
        bars.bar_label(drawn, fmt="%.1f s", padding=3)
        bars.plot([limit, limit], [at - 0.25, at + 0.25], color=LIMIT)
    bars.set_yticks(range(len(loads)), [f"from the {name}" for name in loads])
    bars.set_ylim(-1, len(loads))
    bars.set_xlabel("seconds (red: the limit)")
    figures = next(iter(loads.values()))
    shown = [one for one in figures["samples"] if one["at_s"] > -1]
    before = figures["private_bytes_before"]
    times = [one["at_s"] for one in shown]
    private = [max(sum(one["private"]) - before, 0) / 1e9 for one in shown]
    cached = [(one["cached"] - shown[0]["cached"]) / 1e9 for one in shown]
    memory.plot(times, private, color=OURS, label="private memory of all ranks, grown by")
    memory.plot(times, cached, color=OTHER, label="page cache of the machine, grown by")
    most_gb = BAR * sum(figures["num_weight_bytes"]) / 1e9
    memory.axhline(most_gb, color=LIMIT, label=f"{BAR:g} x weights")
    memory.set_ylim(0, 1.4 * most_gb)
    memory.set_xlabel("seconds since the load began")
    memory.set_ylabel("GB")
    memory.legend(frameon=False, loc="upper left")
    return save(figure, path)


def serve_rank_0(folder: Path, *, num_ranks: int, num_threads: int, kernels: str) -> None:
    """In a process of its own: load, answer, and say so on standard output."""
    from scripts.bench.local_group import GroupOptions, LocalGroup

    options = GroupOptions(
        folder=folder,
        num_ranks=num_ranks,
        num_threads=num_threads,
        kernels=kernels,
        kv_cache_tokens=_KV_TOKENS,
        max_model_len=_KV_TOKENS,
        max_running_sequences=4,
    )
    with LocalGroup(options, _Speaker()) as group:
        began = time.monotonic()
        answer: list[int] = []
        group.add(list(range(1, _PROMPT_TOKENS + 1)), num_tokens=_ANSWER_TOKENS)
        group.run(lambda step: answer.extend(x for one in step.deltas for x in one.token_ids))
        shard = group.shard
        result = {
            "kernels": group.kernels,
            "answer": answer,
            "answer_s": time.monotonic() - began,
            "phases_s": shard.phases_s,
            "num_weight_bytes": [shard.num_weight_bytes] * num_ranks,
            "num_read_bytes": shard.num_read_bytes,
        }
        print(json.dumps(result), flush=True)
    if len(answer) != _ANSWER_TOKENS:
        raise RuntimeError(f"the answer must have {_ANSWER_TOKENS} tokens, got {answer}")


class _Speaker:
    """Says on standard output when the first piece of a weight is there, and when the last is."""

    def __init__(self) -> None:
        self._has_begun = False

    def __call__(self, phase: str, num_bytes: int, num_total_bytes: int) -> None:
        if num_bytes and not self._has_begun:
            self._has_begun = True
            print(_BEGIN, flush=True)
        if num_bytes and num_bytes == num_total_bytes:
            print(_LOADED, flush=True)


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Write, measure, load, report."""
    began = time.monotonic()
    num_bytes = write_random_checkpoint(folder, SHAPES[arguments.shape])
    print(f"wrote {num_bytes / 1e9:.2f} GB in {time.monotonic() - began:.0f} s", flush=True)
    files = sorted(folder.glob("*.safetensors"))
    limits = measure_limits(
        files, num_bytes=num_bytes, num_threads=arguments.ranks * arguments.threads
    )
    print(
        f"limits: disk {limits.disk_bytes_per_s / 1e9:.2f} GB/s, memory copies"
        f" {limits.copied_bytes_per_s / 1e9:.2f}, into new memory"
        f" {limits.touched_bytes_per_s / 1e9:.2f} GB/s with {limits.num_threads} threads",
        flush=True,
    )
    options = {
        "num_ranks": arguments.ranks,
        "num_threads": arguments.threads,
        "kernels": arguments.kernels,
    }
    let_go_of_memory()
    loads = {"disk": report(observe(folder, **options), limits, num_bytes)}
    show("from the disk", loads["disk"])
    if psutil.virtual_memory().available > 3 * num_bytes:
        for file in files:
            file.read_bytes()
        let_go_of_memory()
        loads["page cache"] = report(observe(folder, **options), limits, num_bytes)
        show("from the page cache", loads["page cache"])
    forget(files)
    results = {"shape": arguments.shape, "num_bytes": num_bytes, "limits": asdict(limits)}
    written = write_results(f"load-{arguments.shape}", {**results, **options, "loads": loads})
    print("written:", written, plot(written, loads))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--rank-0", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_0 is not None:
        serve_rank_0(
            arguments.rank_0,
            num_ranks=arguments.ranks,
            num_threads=arguments.threads,
            kernels=arguments.kernels,
        )
        return
    print(f"machine: {machine()}")
    base = cache_folder()
    base.mkdir(parents=True, exist_ok=True)
    num_bytes = num_checkpoint_bytes(SHAPES[arguments.shape])
    _check_room(base, num_bytes)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="load-", dir=base) as folder:
        print(
            f"writes {num_bytes / 1e9:.1f} GB to {folder}, loads them and deletes them:"
            f" {num_bytes / _FASTEST:.0f} to {num_bytes / _SLOWEST:.0f} s",
            flush=True,
        )
        run(arguments, Path(folder))
    print(f"deleted: {folder}")


def _check_room(base: Path, num_bytes: int) -> None:
    """End where a model of this size does not fit the disk or the memory."""
    needed, free = int(num_bytes * _DISK_MARGIN), shutil.disk_usage(base).free
    if needed > free:
        sys.exit(f"{base} needs {needed / 1e9:.1f} GB and has {free / 1e9:.1f} GB free")
    needed = int(num_bytes * BAR) + _MEMORY_MARGIN_BYTES
    available = psutil.virtual_memory().available
    if needed > available:
        sys.exit(f"loading needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} are free")


if __name__ == "__main__":
    main()
