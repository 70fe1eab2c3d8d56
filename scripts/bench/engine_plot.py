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
    panels = {name: speeds for name in limits if (speeds := _speeds(content, name))}
    figure, axes = new_figure(len(panels), width=4.2 * len(panels), height=4.2)
    for one, (name, speeds) in zip(axes, panels.items(), strict=True):
        keys = sorted(speeds, key=lambda key: speeds[key])
        colours = [OURS if key.startswith("shoal") else PEER for key in keys]
        drawn = one.barh(keys, [speeds[key] for key in keys], color=colours)
        one.bar_label(drawn, fmt="%.1f", padding=3, fontsize=8)
        limit = statistics.median(limits[name].values())
        one.axvline(limit, color=LIMIT, linestyle="--")
        one.set_xlim(0, 1.15 * max([limit, *speeds.values()]))
        one.set_title(f"{name}\nlimit {limit:,.0f} (dashed)", fontsize=10)
        one.set_xlabel("tokens a second")
        one.tick_params(axis="y", labelsize=8)
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
