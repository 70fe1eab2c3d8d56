# ruff: noqa: A005  # the issue names it so; nothing here imports the other
"""Where a decode step's time goes: `python -m scripts.bench.profile`.

The real engine and runner at 16 sequences of the 0.5B's shape; our own timers around the two native
calls of a step. What lies between them is outside: scheduling, the batch, hand-over to the runner's
thread, taking the tokens. What is told while the pass runs costs no time of its own, and is shown
apart. The bar: at most 5 % of a step outside.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.bench.checkpoint import NUM_TOKENS, bench_checkpoint
from scripts.bench.local_group import GroupOptions, LocalGroup
from scripts.bench.plot_style import OTHER, OURS, PEER, new_figure, save
from scripts.bench.probes import num_cores
from scripts.bench.shoal_run import machine, write_results
from serve.engine.ledger import StepResult
from serve.kernels import native

BAR = 0.05
PROMPT_TOKENS = 64
_NUM_FIRST_STEPS = 4  # prompts, and the steps around them
_SEGMENTS = {
    "schedule, batch, hand-over": ("start", "forward_begin"),
    "forward pass (native)": ("forward_begin", "forward_end"),
    "back to the engine": ("forward_end", "sample_begin"),
    "sampling (native)": ("sample_begin", "sample_end"),
    "take the tokens": ("sample_end", "end"),
}
_NATIVE = ("forward pass (native)", "sampling (native)")

Marks = dict[str, float]


class _Timeline:
    """The marks of every step, in order."""

    def __init__(self) -> None:
        self.steps: list[Marks] = []

    def mark(self, name: str) -> None:
        """Now, in the current step."""
        self.steps[-1][name] = time.perf_counter()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call` with a mark before and after it."""

        def run(*arguments: Any) -> Any:
            if not self.steps:
                return call(*arguments)
            self.mark(f"{name}_begin")
            try:
                return call(*arguments)
            finally:
                self.mark(f"{name}_end")

        return run


def _watch_kernels(timeline: _Timeline) -> None:
    """Every library that is loaded from now on marks its passes and its sampling."""

    class _Watched(native.NativeLibrary):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            for name, function in (("forward", "shoal_forward"), ("sample", "shoal_sample")):
                timed = timeline.timed(name, getattr(self.functions, function))
                setattr(self.functions, function, timed)

    native.NativeLibrary = _Watched  # type: ignore[misc]


def profile(group: LocalGroup, timeline: _Timeline, *, batch: int, num_tokens: int) -> list[Marks]:
    """The steps in which every sequence decodes, with their marks."""
    draw = random.Random(0)
    for _ in range(batch):
        prompt = [draw.randrange(NUM_TOKENS) for _ in range(PROMPT_TOKENS)]
        group.add(prompt, num_tokens=num_tokens)
    engine = group.engine
    num_told: list[int] = []
    while engine.has_work:
        timeline.steps.append({})
        timeline.mark("start")
        engine.start_step()
        timeline.mark("tell_begin")
        result: StepResult = engine.take_result()
        timeline.mark("tell_end")
        engine.finish_step()
        timeline.mark("end")
        num_told.append(len(result.deltas))
    # What step n made is told in step n + 1.
    full = [
        step
        for step, told in zip(timeline.steps, num_told[1:], strict=False)
        if told == batch and "sample_end" in step
    ]
    return full[_NUM_FIRST_STEPS:]


def summarise(steps: list[Marks]) -> dict[str, Any]:
    """Median milliseconds of each segment, and the share that is outside."""
    segments = {
        name: statistics.median(1e3 * (step[end] - step[begin]) for step in steps)
        for name, (begin, end) in _SEGMENTS.items()
    }
    outside = statistics.median(_outside(step) for step in steps)
    return {
        "num_steps": len(steps),
        "step_ms": statistics.median(1e3 * (step["end"] - step["start"]) for step in steps),
        "segments_ms": segments,
        "told_meanwhile_ms": statistics.median(
            1e3 * (step["tell_end"] - step["tell_begin"]) for step in steps
        ),
        "outside_share": outside,
    }


def _outside(step: Marks) -> float:
    native_s = sum(step[end] - step[begin] for begin, end in map(_SEGMENTS.__getitem__, _NATIVE))
    return 1 - native_s / (step["end"] - step["start"])


def plot(path: Path) -> Path:
    """A step as one bar, its segments in order."""
    content = json.loads(path.read_text())
    figure, axes = new_figure(1, width=11, height=3)
    left = 0.0
    shades = iter(("#d08a2e", "#e0aa64", "#b86e12"))
    for name, milliseconds in content["segments_ms"].items():
        colour = {_NATIVE[0]: OURS, _NATIVE[1]: PEER}.get(name) or next(shades, OTHER)
        label = f"{name}: {milliseconds:.2f} ms"
        axes[0].barh([""], [milliseconds], left=left, color=colour, label=label)
        left += milliseconds
    axes[0].set_xlabel("milliseconds")
    axes[0].set_title(
        f"A decode step of {content['batch']} sequences: {content['outside_share']:.1%} outside"
        f" the kernels (bar: {BAR:.0%})",
        fontsize=11,
    )
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=3, frameon=False)
    return save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two layers: does it work?")
    arguments = parser.parse_args()
    timeline = _Timeline()
    _watch_kernels(timeline)
    options = GroupOptions(
        bench_checkpoint("short" if arguments.quick else "0.5b"),
        num_ranks=arguments.ranks,
        num_threads=max(1, num_cores() // arguments.ranks),
    )
    print(f"machine: {machine()}")
    with LocalGroup(options) as group:
        if group.kernels == "torch":
            raise SystemExit(f"nothing to measure: {native.reason()}")
        steps = profile(group, timeline, batch=arguments.batch, num_tokens=arguments.tokens)
        if not steps:
            raise SystemExit("no step had every sequence in it; ask for more --tokens")
        found = summarise(steps) | {"batch": arguments.batch, "kernels": group.kernels}
    print(f"{found['num_steps']} steps, {found['step_ms']:.2f} ms each ({found['kernels']})")
    for name, milliseconds in found["segments_ms"].items():
        print(f"  {name:<28} {milliseconds:8.3f} ms  {milliseconds / found['step_ms']:6.1%}")
    print(f"  told while the pass runs     {found['told_meanwhile_ms']:8.3f} ms")
    verdict = "met" if found["outside_share"] <= BAR else "missed"
    print(f"outside the kernels: {found['outside_share']:.1%} (bar {BAR:.0%}: {verdict})")
    path = write_results("profile-quick" if arguments.quick else "profile", found)
    print("written:", path, plot(path))


if __name__ == "__main__":
    main()
