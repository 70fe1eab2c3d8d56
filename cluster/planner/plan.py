"""The plan of one model on one node: its layouts, the chosen one and why, its speed.

Not how it is shown (`cluster.cli`). The one decision: a plan that does not work is a plan too, with
reasons and with what would work in the place of a chosen layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from serve.catalog import tensor_parallel_problem
from serve.config import ModelConfig
from serve.errors import ConfigurationError

from .alternatives import alternatives
from .choice import choose
from .hardware import Node
from .layouts import CONTEXTS, Demand, Layout, layout_of, layouts_of
from .memory import BYTES_PER_VALUE, GB
from .prediction import PROMPT_TOKENS, Prediction, predict_copy
from .speed import Roofline
from .subjects import Subject


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model on one node. Without a `chosen` layout, `refused` says why and `would_fit` what."""

    subject: Subject
    node: Node
    demand: Demand
    layouts: tuple[Layout, ...]
    chosen: Layout | None
    reason: str
    refused: str | None
    would_fit: tuple[str, ...]
    prompt_tokens: int = PROMPT_TOKENS

    def prediction(self, layout: Layout) -> Prediction | None:
        """How fast a copy of that layout will be; None where the node's speed is not known."""
        roofline = self.roofline(layout)
        if roofline is None:
            return None
        return predict_copy(roofline, self.demand.engine, prompt_tokens=self.prompt_tokens)

    def roofline(self, layout: Layout) -> Roofline | None:
        """The roofline of one of its layouts."""
        device = self.node.device
        if device is None or layout.problem is not None:
            return None
        return layout.roofline(device)

    def to_dict(self) -> dict[str, Any]:
        """The whole plan as JSON."""
        chosen = self.chosen
        return {
            "model": self.subject.title,
            "hardware": self.node.config.name,
            "node": self.node.title,
            "num_params": self.subject.shape.num_params,
            "chosen": None if chosen is None else chosen.size,
            "replicas_per_node": None if chosen is None else chosen.num_replicas,
            "reason": self.reason,
            "refused": self.refused,
            "would_fit": list(self.would_fit),
            "layouts": [self._layout_dict(layout) for layout in self.layouts],
        }

    def _layout_dict(self, layout: Layout) -> dict[str, Any]:
        prediction = self.prediction(layout)
        return {
            "tensor_parallel": layout.size,
            "replicas_per_node": layout.num_replicas,
            "problem": layout.problem,
            "max_model_len": layout.max_model_len,
            "yarn": layout.yarn,
            "memory": asdict(layout.memory),
            "sequences": {str(length): layout.num_sequences(length) for length in CONTEXTS},
            "prediction": None if prediction is None else prediction.to_dict(),
        }


def plan_model(
    subject: Subject,
    node: Node,
    *,
    size: int | None = None,
    max_model_len: int | None = None,
    prompt_tokens: int = PROMPT_TOKENS,
) -> ModelPlan:
    """Plan a model for a node; `size` and `max_model_len` win over the model's own.

    Raises:
        ConfigurationError: the tensor-parallel size is not legal for the model, or the length is
            or the prompt is beyond what the model can be stretched to.
    """
    model = subject.model
    if size is None and model.tensor_parallel != "auto":
        size = model.tensor_parallel
    demand = _demand(model, node, max_model_len)
    layouts = layouts_of(subject.shape, node, demand)
    _check(subject, size, demand)
    _check_prompt(subject, prompt_tokens, demand)
    if size is not None and size not in [layout.size for layout in layouts]:
        layouts.append(layout_of(subject.shape, node, size, demand))
    candidates = [layout for layout in layouts if size in (None, layout.size)]
    found = choose(candidates, node)
    if found is not None and size is not None:
        found = found[0], "asked for"
    refused = None if found else _refusal(candidates)
    return ModelPlan(
        subject=subject,
        node=node,
        demand=demand,
        layouts=tuple(layouts),
        chosen=found[0] if found else None,
        reason=found[1] if found else "",
        refused=refused,
        would_fit=() if found else tuple(alternatives(subject.shape, node, demand)),
        prompt_tokens=prompt_tokens,
    )


def _demand(model: ModelConfig, node: Node, max_model_len: int | None) -> Demand:
    length = model.max_model_len if max_model_len is None else max_model_len
    if model.dtype != "auto":
        num_bytes = BYTES_PER_VALUE[model.dtype]
    else:
        num_bytes = 2 if node.num_gpus or node.has_bfloat16 else 4
    return Demand(
        engine=model.engine,
        max_model_len=None if length == "auto" else length,
        yarn=None if model.yarn == "auto" else model.yarn,
        bytes_per_value=num_bytes,
    )


def _check(subject: Subject, size: int | None, demand: Demand) -> None:
    shape = subject.shape
    if size is not None:
        problem = tensor_parallel_problem(shape, size)
        if problem is not None:
            raise ConfigurationError(f"{subject.title}: {problem}")
    if demand.max_model_len is None:
        return
    longest = demand.longest(shape)
    if demand.max_model_len > longest:
        raise ConfigurationError(
            f"{subject.title}: max_model_len must be <= {longest:,}, the model's positions"
            f"{' (YaRN is off)' if demand.yarn is False else ''}, got {demand.max_model_len:,}"
        )


def _check_prompt(subject: Subject, prompt_tokens: int, demand: Demand) -> None:
    longest = demand.max_model_len or demand.longest(subject.shape)
    if prompt_tokens > max(longest, PROMPT_TOKENS):  # the usual prompt may be beyond a tiny model
        raise ConfigurationError(
            f"{subject.title}: prompt must be <= {longest:,} tokens, its longest text,"
            f" got {prompt_tokens:,}"
        )


def _refusal(candidates: list[Layout]) -> str:
    legal = [layout for layout in candidates if not (layout.problem or "").startswith("not legal")]
    return "; ".join(f"TP {layout.size}: {layout.problem}" for layout in legal)


def overcommitment(plans: Sequence[ModelPlan]) -> str | None:
    """Why models that fit one by one do not fit on one node together; None if they do."""
    chosen = [(plan, plan.chosen) for plan in plans if plan.chosen is not None]
    if len(chosen) < 2:
        return None
    node = plans[0].node
    copies = [plan.subject.model.replicas.min for plan, _ in chosen]
    if node.num_gpus:
        wanted = sum(count * layout.size for count, (_, layout) in zip(copies, chosen, strict=True))
        return (
            None
            if wanted <= node.num_gpus
            else (f"together they need {wanted} GPUs, a node has {node.num_gpus}")
        )
    needed = sum(
        count * layout.memory.fixed_bytes for count, (_, layout) in zip(copies, chosen, strict=True)
    )
    return (
        None
        if needed <= node.usable_bytes
        else (
            f"together they need {needed / GB:.1f} GB before any KV cache,"
            f" {node.usable_bytes / GB:.1f} GB are free"
        )
    )
