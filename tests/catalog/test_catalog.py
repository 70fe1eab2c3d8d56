"""Arithmetic of the published family, and what of a config.json is refused."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import pytest

from serve.catalog import (
    ModelShape,
    legal_tensor_parallel_sizes,
    stretch_with_yarn,
    tensor_parallel_problem,
)
from serve.errors import CheckpointError, ConfigurationError


def _config(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    return config | changes


def _family(hidden: int, layers: int, heads: int, kv: int, ffn: int, vocab: int, tied: bool):
    return ModelShape.from_config(
        _config(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            intermediate_size=ffn,
            vocab_size=vocab,
            tie_word_embeddings=tied,
        )
    )


FAMILY = {
    "0.5B": _family(896, 24, 14, 2, 4864, 151936, True),
    "1.5B": _family(1536, 28, 12, 2, 8960, 151936, True),
    "3B": _family(2048, 36, 16, 2, 11008, 151936, True),
    "7B": _family(3584, 28, 28, 4, 18944, 152064, False),
    "14B": _family(5120, 48, 40, 8, 13824, 152064, False),
    "32B": _family(5120, 64, 40, 8, 27648, 152064, False),
    "72B": _family(8192, 80, 64, 8, 29568, 152064, False),
}


@pytest.mark.parametrize(
    ("name", "total", "non_embedding", "biases"),
    [
        ("0.5B", 494_032_768, 357_898_112, 27_648),
        ("7B", 7_615_616_512, 6_525_621_760, 129_024),
        ("72B", 72_706_203_648, 70_214_787_072, 819_200),
    ],
)
def test_parameter_counts_equal_the_published_ones(name, total, non_embedding, biases):
    shape = FAMILY[name]
    assert (shape.num_params, shape.num_non_embedding_params) == (total, non_embedding)
    assert shape.num_qkv_bias_params == biases


@pytest.mark.parametrize(
    ("name", "num_bytes"), [("0.5B", 12_288), ("7B", 57_344), ("72B", 327_680)]
)
def test_kv_bytes_a_token_equal_the_published_ones(name, num_bytes):
    assert FAMILY[name].kv_bytes_per_token(bytes_per_value=2) == num_bytes


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("0.5B", [1, 2]),
        ("1.5B", [1, 2, 4]),
        ("3B", [1, 2, 4, 8, 16]),
        ("7B", [1, 2, 4]),
        ("14B", [1, 2, 4, 8]),
        ("32B", [1, 2, 4, 8]),
        ("72B", [1, 2, 4, 8, 16, 32, 64]),
    ],
)
def test_legal_sizes_of_the_family(name, sizes):
    assert legal_tensor_parallel_sizes(FAMILY[name]) == sizes
    assert all(tensor_parallel_problem(FAMILY[name], size) is None for size in sizes)


@pytest.mark.parametrize(
    ("size", "reasons"),
    [
        (3, ["28 heads are not divisible by 3", "FFN size 18944 is not divisible by 3"]),
        (7, ["FFN size 18944 is not divisible by 7", "4 KV heads and 7 shards"]),
        (8, ["28 heads are not divisible by 8"]),
        (0, ["at least one shard"]),
    ],
)
def test_an_illegal_size_is_refused_with_the_legal_ones_and_every_reason(size, reasons):
    problem = tensor_parallel_problem(FAMILY["7B"], size)
    assert problem is not None
    assert problem.startswith(f"tensor_parallel must be one of 1, 2, 4, got {size}")
    assert all(reason in problem for reason in reasons)


@pytest.mark.parametrize("name", list(FAMILY))
def test_a_shard_holds_its_share_and_whole_copies_only_of_norms_and_few_kv_heads(name):
    shape = FAMILY[name]
    assert shape.num_shard_params(1) == shape.num_params
    for size in legal_tensor_parallel_sizes(shape):
        share = shape.num_shard_params(size)
        copies = shape.num_layers * 2 * shape.hidden * (1 + shape.head_dim) + 2 * shape.hidden
        assert shape.num_params / size <= share <= shape.num_params / size + copies


OLD_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
NEW_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
}


def test_both_forms_of_the_rope_settings_give_one_shape():
    old = ModelShape.from_config(_config(rope_scaling=OLD_YARN))
    new_config = _config(rope_parameters=NEW_YARN)
    del new_config["rope_theta"]
    assert old == ModelShape.from_config(new_config)
    assert old.yarn is not None
    assert (old.max_positions, old.rope_theta) == (131_072, 1e6)
    assert math.isclose(old.yarn.attention_factor, 0.1 * math.log(4) + 1)


def test_a_null_rope_scaling_is_none():
    assert ModelShape.from_config(_config(rope_scaling=None)) == FAMILY["0.5B"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "llama"}, "model_type must be 'qwen2', got 'llama'"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "architectures must be"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized checkpoints"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"use_sliding_window": True}, "sliding-window attention"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window attention"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type must be 'default' or 'yarn'"),
        ({"rope_scaling": "yarn"}, "original_max_position_embeddings"),
        ({"rope_scaling": OLD_YARN | {"factor": 0.5}}, "rope factor must be >= 1"),
        ({"hidden_size": "896"}, "hidden_size must be an integer"),
        ({"hidden_size": 10**400}, "hidden_size must be an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer in [1, 1024], got 0"),
        ({"vocab_size": True}, "vocab_size must be an integer"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
        ({"rope_theta": -1}, "rope_theta must be a number"),
        ({"num_key_value_heads": 4}, "must be a multiple of"),
        ({"hidden_size": 14}, "head_dim must be a multiple of 16"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    ],
)
def test_what_we_cannot_run_is_refused_by_name(changes, reason):
    if changes == {"rope_scaling": "yarn"}:
        changes = {"rope_scaling": OLD_YARN | {"original_max_position_embeddings": -1}}
    with pytest.raises(CheckpointError) as caught:
        ModelShape.from_config(_config(**changes))
    assert reason in str(caught.value)


def test_every_problem_is_reported_at_once():
    with pytest.raises(CheckpointError) as caught:
        ModelShape.from_config({"model_type": "llama", "quantization_config": {}})
    message = str(caught.value)
    assert all(
        name in message
        for name in ("model_type", "quantization_config", "hidden_size", "vocab_size")
    )


def test_sliding_window_that_no_layer_uses_is_accepted():
    unused = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 24}
    assert ModelShape.from_config(_config(**unused)) == FAMILY["0.5B"]


@pytest.mark.parametrize("name", ["7B", "14B", "32B", "72B"])
def test_yarn_stretches_the_large_sizes_to_131072_positions(name):
    stretched = stretch_with_yarn(FAMILY[name])
    assert stretched.max_positions == 131_072
    assert stretched == stretch_with_yarn(stretched)


@pytest.mark.parametrize("name", ["0.5B", "1.5B", "3B"])
def test_yarn_is_refused_for_the_small_sizes(name):
    with pytest.raises(ConfigurationError, match="7B and larger"):
        stretch_with_yarn(FAMILY[name])


def test_yarn_is_refused_where_the_positions_are_not_the_family_s():
    odd = dataclasses.replace(FAMILY["7B"], max_positions=4096)
    with pytest.raises(ConfigurationError, match="32,768 positions, got 4,096"):
        stretch_with_yarn(odd)


def test_catalog_and_checkpoint_import_no_torch():
    code = "import sys, serve.catalog, serve.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
