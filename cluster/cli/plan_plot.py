"""Draws a plan: where each GPU's memory goes, and decoded tokens a second against the batch.

Matplotlib without a display or any state of its own. The one decision: the chosen layout's limits
(memory, arithmetic) are drawn beside its prediction, so that one sees what the batch runs into; a
line ends where the KV cache holds no more such texts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cluster.planner.layouts import Layout
from cluster.planner.memory import GB
from cluster.planner.plan import ModelPlan
from cluster.planner.prediction import CONTEXT_TOKENS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PARTS = (
    ("weights", "weight_bytes", "#2b5c8a"),
    ("activations", "activation_bytes", "#7aa6c2"),
    ("framework", "framework_bytes", "#c9c9c9"),
    ("KV cache", "kv_bytes", "#e08e45"),
    ("free", "free_bytes", "#f3e6d8"),
    ("driver or in use", "reserved_bytes", "#8a8a8a"),
)
_LINES = ("#2b5c8a", "#e08e45", "#4f8f5b", "#9a5ba5", "#b3423f", "#5f5f5f", "#b59a2d")
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def draw_plan(plan: ModelPlan, path: Path) -> None:
    """Write the picture; the name's ending chooses the format.

    Raises:
        OSError: it cannot be written.
        ValueError: the ending is no format that matplotlib has.
    """
    from matplotlib.figure import Figure

    working = [layout for layout in plan.layouts if layout.problem is None]
    layouts = working or list(plan.layouts[:1])
    has_speed = plan.node.device is not None and bool(working)
    figure = Figure(figsize=(12 if has_speed else 6, 4.6), layout="constrained")
    axes = figure.subplots(1, 2 if has_speed else 1, squeeze=False)[0]
    _draw_memory(axes[0], plan, layouts)
    if has_speed:
        _draw_speed(axes[1], plan, working)
    figure.suptitle(f"{plan.subject.title} on {plan.node.title}", fontweight="bold")
    figure.savefig(path, dpi=150)


def _draw_memory(axes: Axes, plan: ModelPlan, layouts: list[Layout]) -> None:
    names = [_name(plan, layout) for layout in layouts]
    bottoms = [0.0] * len(layouts)
    for title, field, color in _PARTS:
        heights = [max(0, getattr(layout.memory, field)) / GB for layout in layouts]
        axes.bar(names, heights, bottom=bottoms, label=title, color=color, width=0.6)
        for index, (height, bottom) in enumerate(zip(heights, bottoms, strict=True)):
            if height > 0.06 * layouts[0].memory.total_bytes / GB:
                color_of_text = "black" if title in ("free", "framework") else "white"
                axes.text(
                    index, bottom + height / 2, f"{height:.1f}", ha="center", va="center",
                    color=color_of_text, fontsize=9,
                )  # fmt: skip
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    total = layouts[0].memory.total_bytes / GB
    axes.axhline(total, color="black", linewidth=1, linestyle="--", label=f"all of it, {total:.0f}")
    axes.set_ylabel("GB")
    axes.set_title("memory of one GPU" if plan.node.num_gpus else "memory of one copy")
    axes.set_ylim(0, max(*bottoms, total) * 1.04)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False
    )
    axes.spines[["top", "right"]].set_visible(False)


def _draw_speed(axes: Axes, plan: ModelPlan, layouts: list[Layout]) -> None:
    for layout, color in zip(layouts, _LINES, strict=False):
        roofline = plan.roofline(layout)
        assert roofline is not None, "the node's speed is known"
        context = min(CONTEXT_TOKENS, layout.max_model_len)
        held = [batch for batch in _BATCHES if batch <= layout.num_sequences(context)]
        speeds = [roofline.tokens_per_s(batch, context) for batch in held]
        is_chosen = layout is plan.chosen
        axes.plot(
            held, speeds, color=color, marker="o", markersize=4,
            linewidth=2.4 if is_chosen else 1.2, label=_name(plan, layout),
        )  # fmt: skip
        if is_chosen:
            _draw_limits(axes, plan, layout, context)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xticks(_BATCHES, [str(batch) for batch in _BATCHES])
    axes.set_xlabel("sequences decoding at once in one copy")
    axes.set_ylabel("tokens a second of one copy")
    axes.set_title(f"predicted speed, texts of {CONTEXT_TOKENS:,} tokens")
    axes.grid(visible=True, which="major", alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_limits(axes: Axes, plan: ModelPlan, layout: Layout, context: int) -> None:
    roofline = plan.roofline(layout)
    assert roofline is not None, "the node's speed is known"
    steps = [roofline.decode(batch, context) for batch in _BATCHES]
    memory = [
        batch / (step.weights_s + step.kv_s) for batch, step in zip(_BATCHES, steps, strict=True)
    ]
    arithmetic = [batch / step.flops_s for batch, step in zip(_BATCHES, steps, strict=True)]
    axes.plot(_BATCHES, memory, color="#777777", linestyle="--", label="its memory alone")
    axes.plot(_BATCHES, arithmetic, color="#777777", linestyle=":", label="its arithmetic alone")


def _name(plan: ModelPlan, layout: Layout) -> str:
    mark = " (chosen)" if layout is plan.chosen else ""
    copies = f" x {layout.num_replicas}" if plan.node.num_gpus else ""
    return f"TP {layout.size}{copies}{mark}"
