"""Which layout a node should run, and why, in a line.

Not what each layout holds (`cluster.planner.layouts`). The one decision: longest texts first, then
most tokens a second of the whole node when it is busy, then, where the difference is small, more
copies: a lost GPU takes less with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from .hardware import Node
from .layouts import YARN_SEQUENCES, Layout
from .memory import GB

# Sequences that decode at once on the whole node, and their length, when layouts are compared.
BUSY_SEQUENCES = 64
BUSY_CONTEXT = 2_048
# A layout of fewer copies must be this much faster to be preferred.
_WORTH = 1.10
_CPU_TENSOR_PARALLEL = 2


def choose(layouts: Sequence[Layout], node: Node) -> tuple[Layout, str] | None:
    """The layout to run and the reason for it; None where none works."""
    working = [layout for layout in layouts if layout.problem is None]
    if not working:
        return None
    if not node.num_gpus:
        return _choose_cpu(working)
    longest = max(layout.max_model_len for layout in working)
    able = [layout for layout in working if layout.max_model_len == longest]
    shorter = [layout for layout in working if layout.max_model_len < longest]
    best = able[0]
    for layout in able[1:]:
        if busy_tokens_per_s(layout, node) > _WORTH * busy_tokens_per_s(best, node):
            best = layout
    return best, _reason(best, able, shorter, node)


def busy_tokens_per_s(layout: Layout, node: Node) -> float:
    """Decoded tokens a second of the whole node with `BUSY_SEQUENCES` spread over its copies.

    Fewer of them at once where a copy's KV cache holds no more.
    """
    assert node.device is not None, "a node with GPUs has their figures"
    held = layout.num_sequences(BUSY_CONTEXT)
    batch = max(1, min(BUSY_SEQUENCES // layout.num_replicas, held))
    speed = layout.roofline(node.device).tokens_per_s(batch, BUSY_CONTEXT)
    return layout.num_replicas * speed


def _choose_cpu(working: list[Layout]) -> tuple[Layout, str]:
    for layout in working:
        if layout.size == _CPU_TENSOR_PARALLEL:
            return layout, "two shards read the weights with all cores and batch better than one"
    return working[0], f"TP {working[0].size} is the smallest size that works"


def _reason(best: Layout, able: list[Layout], shorter: list[Layout], node: Node) -> str:
    reasons = []
    if shorter:
        names = " and ".join(f"TP {layout.size}" for layout in shorter)
        held = f"{YARN_SEQUENCES} texts" if best.yarn else "a text"
        does = "does" if len(shorter) == 1 else "do"
        reasons.append(
            f"its KV cache holds {held} of {best.max_model_len:,} tokens, as {names} {does} not"
        )
    others = [layout for layout in able if layout is not best]
    if others:
        speeds = ", ".join(
            f"{busy_tokens_per_s(layout, node):,.0f} with TP {layout.size}" for layout in others
        )
        reasons.append(
            f"{BUSY_SEQUENCES} texts on the node are continued at"
            f" {busy_tokens_per_s(best, node):,.0f} tok/s ({speeds})"
        )
        reasons.append(_trade(best, others[0] if others[0].size < best.size else others[-1], node))
    return "; ".join(reasons) or "it is the only size that works here"


def _trade(best: Layout, other: Layout, node: Node) -> str:
    """What the best layout gains and pays against one that is split otherwise."""
    assert node.device is not None, "a node with GPUs has their figures"
    ours, theirs = best.roofline(node.device), other.roofline(node.device)
    batch = max(1, BUSY_SEQUENCES // best.num_replicas)
    if best.size < other.size:
        cost_s = theirs.decode(batch, BUSY_CONTEXT).all_reduce_s
        return (
            f"{best.num_replicas} copies lose less with a GPU, and TP {other.size} would spend"
            f" {cost_s * 1e3:.1f} ms of a step on all-reduces"
        )
    cost_ms = ours.decode(batch, BUSY_CONTEXT).all_reduce_s * 1e3
    return (
        f"a GPU reads {ours.read_bytes / GB:.1f} GB of weights a step instead of"
        f" {theirs.read_bytes / GB:.1f} with TP {other.size}, for {cost_ms:.1f} ms of all-reduces"
    )
