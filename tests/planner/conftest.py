from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve.catalog import ModelShape
from serve.checkpoint import tensor_shapes

SMALL: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 2048,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}

TOKENIZER: dict[str, Any] = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 99}, "merges": []}}

MakeModel = Callable[..., Path]


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """Writes a model folder of zeros; keywords change config.json, `drop` leaves a tensor out."""

    def make(name: str = "small", *, drop: str = "", **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = {**SMALL, **changes}
        (folder / "config.json").write_text(json.dumps(config))
        header: dict[str, Any] = {}
        offset = 0
        for tensor, shape in tensor_shapes(ModelShape.from_config(config)).items():
            if tensor == drop:
                continue
            size = 2
            for side in shape:
                size *= side
            header[tensor] = {
                "dtype": "BF16",
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        encoded = json.dumps(header).encode()
        start = struct.pack("<Q", len(encoded)) + encoded
        with (folder / "model.safetensors").open("wb") as file:
            file.write(start)
            file.truncate(len(start) + offset)  # sparse: a large model takes no disk
        (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        return folder

    return make
