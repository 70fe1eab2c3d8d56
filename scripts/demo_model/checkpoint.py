"""The checkpoint folder: weights in bfloat16 and the configurations that transformers reads."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Qwen2ForCausalLM


def save_checkpoint(model: Qwen2ForCausalLM, folder: Path, figures: dict[str, str]) -> None:
    """Writes model.safetensors, config.json and generation_config.json.

    `figures` of the training go into the metadata of the weights, so that they cannot part.
    """
    config = model.config
    tensors = {
        name: param.detach().to(torch.bfloat16).contiguous()
        for name, param in model.named_parameters()
    }
    path = folder / "model.safetensors"
    save_file(tensors, str(path), metadata={"format": "pt", **figures})
    path.chmod(0o644)
    _write(
        folder / "config.json",
        {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "hidden_act": "silu",
            "hidden_size": config.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": config.intermediate_size,
            "max_position_embeddings": config.max_position_embeddings,
            "max_window_layers": config.num_hidden_layers,
            "model_type": "qwen2",
            "num_attention_heads": config.num_attention_heads,
            "num_hidden_layers": config.num_hidden_layers,
            "num_key_value_heads": config.num_key_value_heads,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": config.vocab_size,
        },
    )
    _write(
        folder / "generation_config.json",
        {
            "bos_token_id": config.bos_token_id,
            "do_sample": True,
            "eos_token_id": [config.eos_token_id, config.bos_token_id],
            "pad_token_id": config.bos_token_id,
            "repetition_penalty": 1.0,
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
        },
    )


def read_figures(folder: Path) -> dict[str, str]:
    """Returns the figures that the weights carry."""
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        figures: dict[str, str] = file.metadata()
    return figures


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
