"""The shape of a Qwen2 model and what follows from it by arithmetic: counts, bytes, legal sizes.

Nothing here reads a file, and nothing imports torch: the planner computes memory and legal sizes
from the same numbers that the model is built from. The one decision behind it: a `ModelShape`
exists only for a model that we can run, so nobody downstream asks whether a feature is supported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from serve.errors import CheckpointError, ConfigurationError

# The published family: every size has 32,768 positions; those of 7B and larger stretch by YaRN.
_YARN_FACTOR = 4.0
_YARN_ORIGINAL_POSITIONS = 32_768
_YARN_MIN_PARAMS = 6_000_000_000


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN's settings (Peng et al., 2023, arXiv:2309.00071), as `config.json` writes them.

    `attention_factor` scales cosine and sine; `beta_fast` and `beta_slow` are numbers of rotations
    over `original_max_positions` between which a dimension goes from untouched to interpolated.
    """

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Everything of `config.json` that decides the model's tensors and arithmetic.

    `max_positions` already counts YaRN's stretch. `is_tied` means that the LM head is the input
    embedding.
    """

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    vocab_size: int
    is_tied: bool
    rope_theta: float
    rms_norm_eps: float
    max_positions: int
    yarn: Yarn | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Parse a `config.json` of the Qwen2 architecture, as transformers 4 or 5 writes it.

        Raises:
            CheckpointError: another architecture, a feature that we do not have, or values that
                do not fit together; the message lists every reason.
        """
        fields = _Fields(config)
        problems = fields.problems
        problems.extend(_unsupported(config))
        hidden = fields.integer("hidden_size", maximum=1 << 20)
        num_heads = fields.integer("num_attention_heads", maximum=4096)
        num_kv_heads = fields.integer("num_key_value_heads", default=num_heads, maximum=4096)
        head_dim = fields.integer("head_dim", default=max(hidden // num_heads, 1), maximum=4096)
        if num_heads % num_kv_heads:
            problems.append(
                f"num_attention_heads ({num_heads}) must be a multiple of"
                f" num_key_value_heads ({num_kv_heads})"
            )
        if head_dim % 16:
            problems.append(f"head_dim must be a multiple of 16, got {head_dim}")
        max_positions = fields.integer("max_position_embeddings", maximum=1 << 24)
        rope = _rope_settings(config)
        theta = _Fields(rope, problems).number("rope_theta", default=10_000.0)
        yarn = _parse_yarn(rope, max_positions, problems)
        shape = cls(
            hidden=hidden,
            num_layers=fields.integer("num_hidden_layers", maximum=1024),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            ffn=fields.integer("intermediate_size", maximum=1 << 22),
            vocab_size=fields.integer("vocab_size", maximum=1 << 24),
            is_tied=fields.boolean("tie_word_embeddings"),
            rope_theta=theta,
            rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
            max_positions=int(yarn.factor * yarn.original_max_positions) if yarn else max_positions,
            yarn=yarn,
        )
        if problems:
            raise CheckpointError("config.json: " + "; ".join(problems))
        return shape

    @property
    def num_layer_params(self) -> int:
        """Parameters of one decoder layer, Q, K, V biases included."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden * (2 * q_size + 2 * kv_size)
        return attention + q_size + 2 * kv_size + 3 * self.hidden * self.ffn + 2 * self.hidden

    @property
    def num_non_embedding_params(self) -> int:
        """Parameters without the input embedding and without an LM head of its own."""
        return self.num_layers * self.num_layer_params + self.hidden

    @property
    def num_params(self) -> int:
        """All parameters; a tied LM head counts once."""
        num_tables = 1 if self.is_tied else 2
        return self.num_non_embedding_params + num_tables * self.vocab_size * self.hidden

    @property
    def num_qkv_bias_params(self) -> int:
        """Parameters of the Q, K and V biases."""
        return self.num_layers * (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def num_shard_params(self, size: int) -> int:
        """Parameters that one of `size` ranks holds: norms whole, KV heads copied where needed."""
        q_size = self.num_heads * self.head_dim // size
        kv_size = num_shard_kv_heads(self, size) * self.head_dim
        attention = self.hidden * (2 * q_size + 2 * kv_size) + q_size + 2 * kv_size
        layer = attention + 3 * self.hidden * self.ffn // size + 2 * self.hidden
        num_tables = 1 if self.is_tied else 2
        table = num_tables * math.ceil(self.vocab_size / size) * self.hidden
        return self.num_layers * layer + self.hidden + table

    def kv_bytes_per_token(self, *, bytes_per_value: int, size: int = 1) -> int:
        """Bytes of KV cache that one token takes on one of `size` ranks (all of it for 1)."""
        num_values = 2 * self.num_layers * num_shard_kv_heads(self, size) * self.head_dim
        return num_values * bytes_per_value


def num_shard_kv_heads(shape: ModelShape, size: int) -> int:
    """KV heads that each of `size` ranks holds; at least one, copied where ranks outnumber them."""
    return max(1, shape.num_kv_heads // size)


def legal_tensor_parallel_sizes(shape: ModelShape) -> list[int]:
    """Every size that the model can be split into, ascending."""
    return [size for size in range(1, shape.num_heads + 1) if not _splitting_faults(shape, size)]


def tensor_parallel_problem(shape: ModelShape, size: int) -> str | None:
    """Why the model cannot be split into `size` shards, naming the legal sizes; None if it can."""
    faults = _splitting_faults(shape, size)
    if not faults:
        return None
    legal = ", ".join(map(str, legal_tensor_parallel_sizes(shape)))
    return f"tensor_parallel must be one of {legal}, got {size}: {'; '.join(faults)}"


def is_stretchable(shape: ModelShape) -> bool:
    """Whether the family publishes a YaRN setting for this size that is not configured yet."""
    return (
        shape.yarn is None
        and shape.num_non_embedding_params >= _YARN_MIN_PARAMS
        and shape.max_positions == _YARN_ORIGINAL_POSITIONS
    )


def shape_for_length(
    shape: ModelShape, *, yarn: bool | str, max_model_len: int | str
) -> ModelShape:
    """The shape to serve: stretched where `yarn` is true, or "auto" and the length asks for it.

    Raises:
        ConfigurationError: `yarn` is true and the model does not stretch.
    """
    if yarn == "auto":
        is_longer = isinstance(max_model_len, int) and max_model_len > shape.max_positions
        return stretch_with_yarn(shape) if is_longer and is_stretchable(shape) else shape
    return stretch_with_yarn(shape) if yarn else shape


def stretch_with_yarn(shape: ModelShape) -> ModelShape:
    """The shape with the YaRN setting that the Qwen2.5 family publishes: 4 x 32,768 positions.

    A checkpoint that already configures YaRN is returned as it is.

    Raises:
        ConfigurationError: the family does not stretch this size (smaller than 7B), or the
            checkpoint has another number of positions.
    """
    if shape.yarn is not None:
        return shape
    num_params = shape.num_non_embedding_params
    if num_params < _YARN_MIN_PARAMS:
        raise ConfigurationError(
            "yarn: true is for Qwen2.5 models of 7B and larger; this checkpoint has"
            f" {num_params:,} parameters without embeddings (must be >= {_YARN_MIN_PARAMS:,})"
        )
    if shape.max_positions != _YARN_ORIGINAL_POSITIONS:
        raise ConfigurationError(
            f"yarn: true needs a checkpoint of {_YARN_ORIGINAL_POSITIONS:,} positions,"
            f" got {shape.max_positions:,}"
        )
    yarn = Yarn(_YARN_FACTOR, _YARN_ORIGINAL_POSITIONS, _attention_factor(_YARN_FACTOR))
    return replace(shape, max_positions=int(_YARN_FACTOR) * _YARN_ORIGINAL_POSITIONS, yarn=yarn)


def _splitting_faults(shape: ModelShape, size: int) -> list[str]:
    if size < 1:
        return ["a model has at least one shard"]
    faults = []
    if shape.num_heads % size:
        faults.append(f"{shape.num_heads} heads are not divisible by {size}")
    if shape.ffn % size:
        faults.append(f"the FFN size {shape.ffn} is not divisible by {size}")
    if shape.num_kv_heads % size and size % shape.num_kv_heads:
        faults.append(f"{shape.num_kv_heads} KV heads and {size} shards do not divide one another")
    return faults


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if config.get("model_type") != "qwen2":
        problems.append(f"model_type must be 'qwen2', got {_shown(config.get('model_type'))}")
    architectures = config.get("architectures") or ["Qwen2ForCausalLM"]
    if architectures != ["Qwen2ForCausalLM"]:
        problems.append(f"architectures must be ['Qwen2ForCausalLM'], got {_shown(architectures)}")
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        problems.append(
            f"quantization_config: quantized checkpoints are not supported, got {_shown(method)};"
            " take the model's original, in bfloat16 or float16"
        )
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act must be 'silu', got {_shown(config['hidden_act'])}")
    if _slides(config):
        problems.append("use_sliding_window: sliding-window attention is not supported")
    return problems


def _slides(config: Mapping[str, Any]) -> bool:
    layer_types = config.get("layer_types")
    if isinstance(layer_types, list):
        return any(kind != "full_attention" for kind in layer_types)
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return False
    first, num_layers = config.get("max_window_layers", 28), config.get("num_hidden_layers")
    return not (isinstance(first, int) and isinstance(num_layers, int) and first >= num_layers)


def _rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """One dict in the form of transformers 5 (`rope_parameters`), whichever form the file has."""
    settings: dict[str, Any] = {"rope_type": "default"}
    if "rope_theta" in config:
        settings["rope_theta"] = config["rope_theta"]
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if isinstance(value, dict):
            settings.update({name: item for name, item in value.items() if item is not None})
            settings["rope_type"] = value.get("rope_type", value.get("type", "default"))
        elif value is not None:
            settings["rope_type"] = value
    return settings


def _parse_yarn(rope: Mapping[str, Any], max_positions: int, problems: list[str]) -> Yarn | None:
    if rope["rope_type"] == "default":
        return None
    if rope["rope_type"] != "yarn":
        problems.append(f"rope_type must be 'default' or 'yarn', got {_shown(rope['rope_type'])}")
        return None
    fields = _Fields(rope, problems)
    original = fields.integer(
        "original_max_position_embeddings", default=max_positions, maximum=1 << 24
    )
    factor = fields.number("factor", default=max_positions / original)
    if factor < 1:
        problems.append(f"rope factor must be >= 1, got {factor}")
        factor = 1.0
    mscale, mscale_all_dim = fields.optional("mscale"), fields.optional("mscale_all_dim")
    inferred = _attention_factor(factor)
    if mscale and mscale_all_dim:
        inferred = _attention_factor(factor, mscale) / _attention_factor(factor, mscale_all_dim)
    return Yarn(
        factor=factor,
        original_max_positions=original,
        attention_factor=fields.number("attention_factor", default=inferred),
        beta_fast=fields.number("beta_fast", default=32.0),
        beta_slow=fields.number("beta_slow", default=1.0),
        truncate=fields.boolean("truncate", default=True),
    )


def _attention_factor(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


class _Fields:
    """Typed access to untrusted JSON: a bad value is noted in `problems` and read as a safe one."""

    def __init__(self, source: Mapping[str, Any], problems: list[str] | None = None) -> None:
        self._source = source
        self.problems: list[str] = [] if problems is None else problems

    def integer(self, name: str, *, maximum: int, default: int | None = None) -> int:
        def fits(value: object) -> bool:
            return isinstance(value, int) and 1 <= value <= maximum

        return int(self._read(name, default, fits, f"an integer in [1, {maximum}]", 1))

    def number(self, name: str, *, default: float) -> float:
        def fits(value: object) -> bool:
            return isinstance(value, int | float) and 0 < value < 1e12

        return float(self._read(name, default, fits, "a number in (0, 1e12)", 1.0))

    def optional(self, name: str) -> float | None:
        return self.number(name, default=1.0) if self._source.get(name) else None

    def boolean(self, name: str, *, default: bool = False) -> bool:
        value = self._source.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problems.append(f"{name} must be true or false, got {_shown(value)}")
        return bool(value)

    def _read(
        self,
        name: str,
        default: float | None,
        fits: Callable[[object], bool],
        wanted: str,
        substitute: float,
    ) -> float:
        value = self._source.get(name)
        value = default if value is None else value
        if not isinstance(value, bool) and fits(value):
            assert isinstance(value, int | float)
            return value
        got = "nothing" if value is None else _shown(value)
        self.problems.append(f"{name} must be {wanted}, got {got}")
        return substitute


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
