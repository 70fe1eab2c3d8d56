"""A Qwen2 checkpoint of safetensors as one GGUF file, for llama.cpp.

No tokenizer is written: benchmarks speak token ids. Matrices keep bfloat16 or become float16,
vectors become float32, which llama.cpp wants. Needs numpy, and the package `gguf` to write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

MatrixType = Literal["bfloat16", "float16"]

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)$")


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of transformers' Qwen2; a KeyError for any other."""
    found = _LAYER.match(name)
    if found is None:
        return _NAMES[name]
    number, part, kind = found.groups()
    return f"blk.{number}.{_LAYER_NAMES[part]}.{kind}"


def read_bfloat16(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a file of bfloat16 tensors, as the uint16 that they are stored in."""
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(num_bytes))
    data = np.memmap(path, np.uint8, "r", 8 + num_bytes)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}"
        begin, end = entry["data_offsets"]
        yield name, data[begin:end].view(np.uint16).reshape(entry["shape"])


def to_float32(bits: np.ndarray) -> np.ndarray:
    """The values of bfloat16 numbers."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def gguf_tensors(folder: Path, matrix_type: MatrixType) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under llama.cpp's name: vectors float32, matrices uint16 or float16.

    The uint16 are the bits of bfloat16 numbers.
    """
    for path in sorted(folder.glob("*.safetensors")):
        for name, bits in read_bfloat16(path):
            if bits.ndim == 1:
                yield gguf_name(name), to_float32(bits)
            elif matrix_type == "float16":
                yield gguf_name(name), to_float32(bits).astype(np.float16)
            else:
                yield gguf_name(name), bits


def write_gguf(folder: Path, path: Path, matrix_type: MatrixType) -> None:
    """Write the checkpoint in `folder` to the file `path`."""
    import gguf  # type: ignore[import-not-found]

    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, values in gguf_tensors(folder, matrix_type):
        if values.dtype == np.uint16:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, np.ascontiguousarray(values).view(np.uint8), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
