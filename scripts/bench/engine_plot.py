"""The picture of `scripts.bench.engine`'s JSON: a panel a workload, the limit as a line."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from scripts.bench.plot_style import LIMIT, OURS, PEER, new_figure, save


def plot_engines(path: Path) -> Path:
    """Draw the results in `path`; returns the picture's path."""
    content = json.loads(path.read_text())
    limits = content["limits_tokens_per_s"]
    figure, axes = new_figure(len(limits), width=4.2 * len(limits), height=4.2)
    for one, (name, by_round) in zip(axes, limits.items(), strict=True):
        speeds = _speeds(content, name)
        keys = sorted(speeds, key=lambda key: speeds[key])
        colours = [OURS if key.startswith("shoal") else PEER for key in keys]
        drawn = one.barh(keys, [speeds[key] for key in keys], color=colours)
        one.bar_label(drawn, fmt="%.1f", padding=3, fontsize=8)
        limit = statistics.median(by_round.values())
        one.axvline(limit, color=LIMIT, linestyle="--", label=f"limit {limit:.0f}")
        one.set_xlim(0, 1.15 * max([limit, *speeds.values()]))
        one.set_title(name, fontsize=11)
        one.set_xlabel("tokens a second")
        one.tick_params(axis="y", labelsize=8)
        one.legend(loc="lower right", fontsize=8, frameon=False)
    machine = content["machine"]
    figure.suptitle(
        f"Qwen2.5-0.5B's shape on {machine['num_cores']} cores of {machine['cpu']};"
        " medians; the limit is memory or arithmetic, whichever binds",
        fontsize=11,
    )
    return save(figure, path)


def _speeds(content: dict[str, Any], name: str) -> dict[str, float]:
    rounds: dict[str, dict[str, float]] = content["tokens_per_s"].get(name, {})
    short: dict[str, float] = content["warm_up_tokens_per_s"].get(name, {})
    return {
        **{f"{key} (1 short run)": speed for key, speed in short.items() if key not in rounds},
        **{key: statistics.median(speeds.values()) for key, speeds in rounds.items() if speeds},
    }
