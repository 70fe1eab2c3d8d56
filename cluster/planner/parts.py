"""A model's parameters by part, from its shape; and what accelerate counts, to hold against it.

Not bytes of a shard (`cluster.planner.memory`). The one decision: the arithmetic is ours and exact;
accelerate, which brings torch, is asked only in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serve.catalog import ModelShape
from serve.errors import ConfigurationError

_ORACLE_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of parameter; `is_embedding`: left out of "non-embedding" counts."""

    name: str
    num_params: int
    is_embedding: bool = False


def parts_of(shape: ModelShape) -> list[Part]:
    """Every parameter of the model, once, in the order of the forward pass."""
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    table = shape.vocab_size * shape.hidden
    attention = shape.hidden * (2 * q_size + 2 * kv_size)
    return [
        Part("embedding", table, is_embedding=True),
        Part("attention", shape.num_layers * attention),
        Part("Q, K, V biases", shape.num_qkv_bias_params),
        Part("MLP", shape.num_layers * 3 * shape.hidden * shape.ffn),
        Part("norms", (2 * shape.num_layers + 1) * shape.hidden),
        Part("LM head", 0 if shape.is_tied else table, is_embedding=True),
    ]


def count_with_accelerate(config_paths: Sequence[Path]) -> list[dict[str, int]]:
    """Parameters by part of the models that transformers builds from config.json files.

    Raises:
        ConfigurationError: transformers cannot build it, or is not installed.
    """
    command = [sys.executable, "-m", "cluster.planner.oracle", *map(str, config_paths)]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_ORACLE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as exc:
        raise ConfigurationError(
            f"accelerate gave no answer within {_ORACLE_TIMEOUT_S:.0f} s"
        ) from exc
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise ConfigurationError(f"accelerate cannot build the model: {lines[-1]}")
    return [json.loads(line) for line in result.stdout.splitlines()[-len(config_paths) :]]


def differences(parts: list[Part], counts: dict[str, int]) -> list[str]:
    """Where two counts disagree, a sentence each."""
    found = [(part.name, part.num_params, counts.get(part.name, 0)) for part in parts]
    return [
        f"{name}: {ours:,} by arithmetic, {theirs:,} by accelerate"
        for name, ours, theirs in found
        if ours != theirs
    ]
