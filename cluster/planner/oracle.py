"""Counts the parameters of models that transformers builds from config.json files, without weights.

`python -m cluster.planner.oracle CONFIG...` prints `{part: parameters}`, a line each. A process of
its own, since transformers imports torch, which the control plane never does.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

_PARTS = (
    ("embed_tokens", "embedding"),
    ("lm_head", "LM head"),
    ("norm", "norms"),
    ("mlp", "MLP"),
    ("bias", "Q, K, V biases"),
    ("self_attn", "attention"),
)


def count_parameters(config_path: Path) -> dict[str, int]:
    """Parameters by part; a tied LM head counts once, as the embedding."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoConfig, AutoModelForCausalLM

    values = json.loads(config_path.read_text(encoding="utf-8"))
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.tie_weights()
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[_part(name)] += parameter.numel()
    return dict(counts)


def _part(name: str) -> str:
    return next((part for piece, part in _PARTS if piece in name), name)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(json.dumps(count_parameters(Path(argument))))  # noqa: T201 - this is its interface
