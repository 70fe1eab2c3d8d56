"""How benchmarks draw: one look for every picture, and none needs a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

OURS, PEER, OTHER, LIMIT = "#1769aa", "#9aa5b1", "#d08a2e", "#b3261e"
_DPI = 120


def new_figure(num_columns: int, *, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure with axes side by side."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, num_columns, figsize=(width, height), squeeze=False, layout="constrained"
    )
    for one in axes[0]:
        one.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def save(figure: Any, path: Path) -> Path:
    """Write the figure beside the JSON file `path`; returns where."""
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=_DPI)
    return target
