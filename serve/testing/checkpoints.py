"""Small random Qwen2 checkpoints, written by transformers, for tests and benchmarks.

The exact head structures of the family at a fraction of its size, so that the whole path runs in
seconds. Needs transformers and torch; import it only in tests and scripts.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import serve.demo
from serve.kernels.dtypes import DtypeName


def make_checkpoint(
    path: Path,
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    num_layers: int = 2,
    ffn: int = 96,
    vocab_size: int = 131,
    is_tied: bool = True,
    max_positions: int = 512,
    yarn_factor: float | None = None,
    dtype: DtypeName = "float32",
    max_shard_size: str = "1GB",
    seed: int = 0,
) -> Path:
    """Write a random checkpoint to the folder `path`; returns it.

    With `yarn_factor` the positions are stretched from `max_positions`. Biases and norms are random
    too, so that forgetting one shows. A small `max_shard_size` gives several files and an index.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
    if yarn_factor is not None:
        rope |= {
            "rope_type": "yarn",
            "factor": yarn_factor,
            "original_max_position_embeddings": max_positions,
        }
    config = Qwen2Config(
        hidden_size=num_heads * head_dim,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        intermediate_size=ffn,
        vocab_size=vocab_size,
        tie_word_embeddings=is_tied,
        max_position_embeddings=max_positions,
        rope_parameters=rope,
        rms_norm_eps=1e-6,
        initializer_range=0.2,
        eos_token_id=vocab_size - 1,
    )
    generator = torch.Generator().manual_seed(seed)
    model: Any = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.3
            mean = 1.0 if "norm" in name else 0.0
            parameter.copy_(mean + scale * torch.randn(parameter.shape, generator=generator))
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=max_shard_size)
    return path


def write_tokenizer(path: Path, *, num_real_tokens: int) -> None:
    """A `tokenizer.json` with that many ids and no more: enough to count them."""
    vocabulary = {f"t{token_id}": token_id for token_id in range(num_real_tokens)}
    tokenizer = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))


def add_demo_tokenizer(path: Path) -> Path:
    """Give the checkpoint in `path` the demo model's tokenizer and template; returns `path`.

    Its `vocab_size` must be at least the demo's.
    """
    demo = Path(serve.demo.__file__).parent
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(demo / name, path / name)
    return path
