"""What one GPU reaches, and how near its limits that is; done in ten minutes on a bare machine.

    python -m scripts.bench.gpu --output results   (torch with triton, numpy, msgspec, psutil)
    python -m scripts.bench.gpu --rehearse         (on a CPU, a tiny shape: does the script run?)

Weights of the 7B shape are made on the GPU. First the card's own limits (read bandwidth, bf16
products), then decode at several batch sizes, greedy text against the CPU's, prefill, decode
without CUDA graphs, our products of one row in several sizes, a long context, and our kernels
against their torch twins. Each part is a process with a time of its own: one that fails, hangs or
breaks the device loses none of the others' figures, nor those it had found itself. Prints all of
them, writes `gpu.json` after every part and, where matplotlib is there, `gpu.png`; ends with the
bars and what was reached.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_NEEDED = ("torch", "numpy", "msgspec", "psutil")
# The longest that each part may take, in seconds; what the bars ask for comes first.
_PARTS_S = {
    "environment": 60,
    "limits": 60,
    "decode": 180,
    "agreement": 120,
    "prefill": 120,
    "decode without graphs": 90,
    "row products": 90,
    "long context": 90,
    "kernels against their twins": 240,
}
_LEAST_S = 15  # shorter than a start of torch: not worth one
_BANDWIDTH_SHARE = 0.85
_H200_TOKENS_PER_S = 288


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """Run every part that time is left for; their findings by name, on disk after each."""
    deadline_s = time.monotonic() + 60 * options.minutes
    options.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name, limit_s in _PARTS_S.items():
        began_s = time.monotonic()
        left_s = min(limit_s, deadline_s - began_s)
        print(f"\n== {name}", flush=True)
        if left_s < _LEAST_S:
            results[name] = {"skipped": "no time was left"}
            print("skipped: no time was left", flush=True)
        else:
            results[name] = _run_part(name, options, left_s, results.get("limits", {}))
            print(f"   {time.monotonic() - began_s:.1f} s", flush=True)
        (options.output / "gpu.json").write_text(json.dumps(results, indent=1))
        if name == "environment" and "error" in results[name]:
            break  # no device, or none that torch can use: nothing else would run
    return results


def _run_part(
    name: str, options: argparse.Namespace, limit_s: float, limits: dict[str, Any]
) -> dict[str, Any]:
    """What a process found within `limit_s`, with its error where it did not end well."""
    path = options.output / f"gpu-{name.replace(' ', '-')}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "scripts.bench.gpu", "--output", str(options.output)]
    command += ["--shape", options.shape, "--part", name, "--limits", json.dumps(limits)]
    command += ["--rehearse"] * options.rehearse
    process = subprocess.Popen(command, start_new_session=True)
    problem = f"not done after {limit_s:.0f} s"
    try:
        status = process.wait(limit_s)
        problem = f"the process ended with {status}" if status else ""
    except subprocess.TimeoutExpired:
        print(f"stopped: {problem}", flush=True)
    finally:
        with contextlib.suppress(ProcessLookupError):  # with what it started, pytest say
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):  # it may have ended before or while it wrote
        found = json.loads(path.read_text())
    path.unlink(missing_ok=True)
    if problem:
        found.setdefault("error", problem)
    return found


def _run_here(options: argparse.Namespace) -> int:
    """One part, in this process."""
    from .gpu_parts import Bench

    path = options.output / f"gpu-{options.part.replace(' ', '-')}.json"
    limits = json.loads(options.limits)
    bench = Bench(shape=options.shape, is_rehearsal=options.rehearse, limits=limits, path=path)
    bench.run(options.part)
    return 0


def summary(results: dict[str, Any]) -> list[str]:
    """The bars, and what was reached; "not measured" where a part did not come so far."""

    def value(part: str, row: str, key: str) -> float | None:
        found = results.get(part, {}).get(row)
        return found.get(key) if isinstance(found, dict) else None

    def line(what: str, number: float | None, unit: str, bar: float | None = None) -> str:
        if number is None:
            return f"{what:44s} not measured"
        verdict = "" if bar is None else f"   bar {bar:g}: {'met' if number >= bar else 'MISSED'}"
        return f"{what:44s} {number:10,.2f} {unit}{verdict}"

    gpu = str(results.get("environment", {}).get("gpu", ""))
    bar = _H200_TOKENS_PER_S if "H200" in gpu else None
    decode, cpu = "decode", "against the CPU"
    return [
        line("decode, batch 1", value(decode, "batch 1", "tokens_per_s"), "tok/s", bar),
        line("  share of the bandwidth that was measured", value(decode, "batch 1",
             "share_of_limit"), "", _BANDWIDTH_SHARE),
        line("decode, batch 64", value(decode, "batch 64", "tokens_per_s"), "tok/s"),
        line("prefill, 2,048 tokens", value("prefill", "1 x 2048", "tokens_per_s"), "tok/s"),
        line("  share of the products that were measured", value("prefill", "1 x 2048",
             "share_of_limit"), ""),
        line("greedy tokens as on the CPU, float32", value("agreement", f"float32, {cpu}",
             "equal_tokens_share"), ""),
        line("greedy tokens as on the CPU, bfloat16", value("agreement", f"bfloat16, {cpu}",
             "equal_tokens_share"), ""),
    ]  # fmt: skip


def _plot(results: dict[str, Any], path: Path) -> None:
    """Decode speed by batch size against the limits."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
        return
    if not any(isinstance(row, dict) for row in results.get("decode", {}).values()):
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name in ("decode", "decode without graphs"):
        rows = {k: v for k, v in results.get(name, {}).items() if isinstance(v, dict)}
        if rows:
            speeds = sorted((int(key.split()[1]), row["tokens_per_s"]) for key, row in rows.items())
            axes.plot(*zip(*speeds, strict=True), marker="o", label=name)
    axes.set(xlabel="sequences", ylabel="tokens a second", xscale="log", yscale="log")
    axes.set_title(str(results.get("environment", {}).get("gpu", "rehearsal")))
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    print(f"wrote {path}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path(), help="folder of the results")
    parser.add_argument("--shape", default="qwen2.5-7b", help="see serve.runner.offline")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, a tiny shape")
    parser.add_argument("--minutes", type=float, default=9.0, help="be done after so many")
    parser.add_argument("--part", choices=_PARTS_S, help="only this one, in this process")
    parser.add_argument("--limits", default="{}", help="of the card, JSON, for one part")
    return parser.parse_args()


def main() -> int:
    """The command; returns its exit status: 1 where a part failed."""
    options = _parse()
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"missing: {', '.join(missing)}. Install them for {sys.executable}, or put their"
              " wheels' contents on PYTHONPATH", file=sys.stderr)  # fmt: skip
        return 2
    if options.part is not None:
        return _run_here(options)
    results = run_all(options)
    print("\n== summary", *summary(results), sep="\n")
    print(f"\nwrote {options.output / 'gpu.json'}")
    _plot(results, options.output / "gpu.png")
    return int(any("error" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
