"""What would fit where a plan does not: shorter texts, more GPUs, a smaller model, a larger card.

The one decision: every suggestion is planned before it is made, so none of them is a guess.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cluster.plan import preset_names
from cluster.plan.shapes import preset_shape
from serve.catalog import ModelShape

from .accelerators import known_gpus
from .hardware import Node, gpu_node
from .layouts import Demand, Layout, layouts_of

_NODE_SIZES = (1, 2, 4, 8)


def alternatives(shape: ModelShape, node: Node, demand: Demand) -> Iterator[str]:
    """One sentence each, closest to what was asked for first."""
    if demand.max_model_len is not None:
        yield from _fewer_tokens(shape, node, demand)
    if node.num_gpus:
        yield from _more_gpus(shape, node, demand)
        yield from _other_gpus(shape, node, demand)
    else:
        yield from _smaller_type(shape, node, demand)
    yield from _smaller_model(shape, node, demand)


def _fewer_tokens(shape: ModelShape, node: Node, demand: Demand) -> Iterator[str]:
    layout = _first(shape, node, replace(demand, max_model_len=None))
    if layout is not None:
        yield f"--max-model-len {layout.max_model_len} with TP {layout.size} on the same hardware"


def _more_gpus(shape: ModelShape, node: Node, demand: Demand) -> Iterator[str]:
    for num_gpus in _NODE_SIZES:
        if num_gpus <= node.num_gpus:
            continue
        layout = _first(shape, replace(node, num_gpus=num_gpus), demand)
        if layout is not None:
            length = f"{layout.max_model_len:,} tokens"
            yield f"{num_gpus} x {node.config.gpu} with TP {layout.size} ({length})"
            return


def _other_gpus(shape: ModelShape, node: Node, demand: Demand) -> Iterator[str]:
    """The cheapest step up: the card with least memory that does it with as many cards."""
    cards = sorted(known_gpus().items(), key=lambda item: item[1].usable_bytes)
    for name, gpu in cards:
        if gpu.usable_bytes <= node.usable_bytes:
            continue
        config = node.config.model_copy(update={"gpu": name})
        layout = _first(shape, gpu_node(config, gpu), demand)
        if layout is not None:
            length = f"{layout.max_model_len:,} tokens"
            yield f"{node.num_gpus} x {name} with TP {layout.size} ({length})"
            return


def _smaller_type(shape: ModelShape, node: Node, demand: Demand) -> Iterator[str]:
    if demand.bytes_per_value == 4 and _first(shape, node, replace(demand, bytes_per_value=2)):
        yield "dtype: bfloat16, which halves the weights (slower where the CPU lacks it)"


def _smaller_model(shape: ModelShape, node: Node, demand: Demand) -> Iterator[str]:
    demand = replace(demand, yarn=None)
    smaller = {
        name: other
        for name in preset_names("models")
        if (other := preset_shape(name)) is not None
        and other.num_params < shape.num_params
        and (demand.max_model_len or 0) <= demand.longest(other)
    }
    for name in sorted(smaller, key=lambda name: smaller[name].num_params, reverse=True):
        layout = _first(smaller[name], node, demand)
        if layout is not None:
            where = f"with TP {layout.size} ({layout.max_model_len:,} tokens)"
            yield f"the preset {name} {where} on the same hardware"
            return


def _first(shape: ModelShape, node: Node, demand: Demand) -> Layout | None:
    working = [layout for layout in layouts_of(shape, node, demand) if layout.problem is None]
    return max(working, key=lambda layout: (layout.max_model_len, -layout.size), default=None)
