from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scripts.bench.peers.gguf_file import gguf_name, gguf_tensors
from serve.testing.checkpoints import make_checkpoint


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"),
        ("model.layers.11.self_attn.q_proj.bias", "blk.11.attn_q.bias"),
        ("model.layers.11.self_attn.o_proj.weight", "blk.11.attn_output.weight"),
        ("model.layers.3.mlp.gate_proj.weight", "blk.3.ffn_gate.weight"),
    ],
)
def test_tensors_get_llama_cpps_names(name: str, expected: str) -> None:
    assert gguf_name(name) == expected


def test_unknown_tensor_is_refused() -> None:
    with pytest.raises(KeyError):
        gguf_name("model.layers.0.self_attn.rotary.weight")


@pytest.mark.parametrize("is_tied", [True, False])
def test_every_value_of_a_checkpoint_is_carried_over(tmp_path: Path, is_tied: bool) -> None:
    folder = make_checkpoint(tmp_path, is_tied=is_tied, dtype="bfloat16", max_shard_size="20KB")
    source = {
        gguf_name(name): tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    assert ("output.weight" in source) is not is_tied
    found = dict(gguf_tensors(folder, "bfloat16"))
    assert found.keys() == source.keys()
    for name, tensor in source.items():
        if tensor.dim() == 1:
            assert found[name].dtype == np.float32
            np.testing.assert_array_equal(found[name], tensor.float().numpy())
        else:
            bits = tensor.view(torch.int16).numpy().view(np.uint16)
            np.testing.assert_array_equal(found[name], bits)


def test_float16_matrices_hold_the_nearest_values(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, dtype="bfloat16")
    source = load_file(next(folder.glob("*.safetensors")))["model.embed_tokens.weight"]
    found = dict(gguf_tensors(folder, "float16"))["token_embd.weight"]
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, source.to(torch.float16).numpy())
