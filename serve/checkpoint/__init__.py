"""A model folder, looked at without reading a weight: its shape, and where each tensor lies.

Reads `config.json`, the safetensors headers (one file, or several behind an index) and, for the
vocabulary's true size, `tokenizer.json`. Not the loader (`serve.model.weights`), and free of
torch: the planner calls it before anything starts. The one decision behind it: everything in the
folder is untrusted. Sizes are bounded before they are read, paths stay inside the folder, pickles
are refused, and every problem is reported at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from serve.catalog import ModelShape
from serve.errors import CheckpointError

from .folder import ModelFolder, shown
from .header import BYTES_PER_VALUE, FileState, Header, TensorLocation, read_header

__all__ = [
    "BYTES_PER_VALUE",
    "Checkpoint",
    "FileState",
    "TensorLocation",
    "count_real_tokens",
    "inspect_checkpoint",
    "is_pickle",
    "read_eos_token_ids",
    "tensor_shapes",
]

_CONFIG = "config.json"
_SINGLE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
_MAX_CONFIG_BYTES = 1 << 20
_MAX_INDEX_BYTES = 1 << 25
_MAX_TOKENIZER_BYTES = 1 << 27


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder that passed inspection: every tensor of `shape` is there, in a dtype we read.

    `files` are the weights' files as they were then, by name.
    """

    path: Path
    shape: ModelShape
    tensors: Mapping[str, TensorLocation]
    files: Mapping[str, FileState]


def inspect_checkpoint(path: Path) -> Checkpoint:
    """Look at the model folder `path`; reads headers only, whatever the size of the model.

    Raises:
        CheckpointError: it cannot be used; the message lists every problem, each with the file's
            or the tensor's name.
    """
    folder = ModelFolder(path)
    if folder.path.is_file():
        raise CheckpointError(
            f"model folder {path} is a file: give the folder with config.json, tokenizer.json and"
            " *.safetensors"
        )
    if not folder.path.is_dir():
        raise CheckpointError(f"model folder {path} does not exist or is not a folder")
    shape = _read_shape(folder)
    found = _locate_tensors(folder)
    if shape is not None and found.files:
        folder.problems.extend(_mismatches(shape, found))
    if folder.problems or shape is None:
        raise folder.refusal()
    return Checkpoint(folder.path, shape, found.tensors, found.files)


def tensor_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this shape must have."""
    hidden, ffn = shape.hidden, shape.ffn
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not shape.is_tied:
        expected["lm_head.weight"] = (shape.vocab_size, hidden)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        for name, size in (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)):
            expected[f"{prefix}.self_attn.{name}.weight"] = (size, hidden)
            expected[f"{prefix}.self_attn.{name}.bias"] = (size,)
        expected[f"{prefix}.self_attn.o_proj.weight"] = (hidden, q_size)
        expected[f"{prefix}.mlp.gate_proj.weight"] = (ffn, hidden)
        expected[f"{prefix}.mlp.up_proj.weight"] = (ffn, hidden)
        expected[f"{prefix}.mlp.down_proj.weight"] = (hidden, ffn)
        expected[f"{prefix}.input_layernorm.weight"] = (hidden,)
        expected[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    return expected


def is_pickle(name: str) -> bool:
    """Whether a file of this name is, by custom, weights as a pickle: code that runs when read."""
    return name.endswith(_PICKLE_SUFFIXES)


def count_real_tokens(path: Path) -> int:
    """Ids that the tokenizer can produce: the largest id in `tokenizer.json`, plus one.

    Logits rows from here on are padding, never sampled.

    Raises:
        CheckpointError: the file is missing, too large or not a tokenizer.
    """
    folder = ModelFolder(path)
    tokenizer = folder.read_json("tokenizer.json", max_bytes=_MAX_TOKENIZER_BYTES)
    if tokenizer is None:
        raise folder.refusal()
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = tokenizer.get("added_tokens") or []
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    if isinstance(added, list):
        ids += [token.get("id") for token in added if isinstance(token, dict)]
    if not ids or not all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
        raise CheckpointError(
            f"model folder {path}: tokenizer.json has no vocabulary of integer ids"
        )
    return int(max(ids)) + 1


def read_eos_token_ids(path: Path) -> tuple[int, ...]:
    """Ids that end an answer: `generation_config.json`'s, else `config.json`'s; may be empty.

    Raises:
        CheckpointError: one of them is not an id.
    """
    folder = ModelFolder(path)
    for name in ("generation_config.json", _CONFIG):
        found = (folder.read_json(name, max_bytes=_MAX_CONFIG_BYTES) or {}).get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        if found is None:
            continue
        if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
            raise CheckpointError(f"model folder {path}: {name}: eos_token_id is not an id")
        return tuple(ids)
    return ()


def _read_shape(folder: ModelFolder) -> ModelShape | None:
    config = folder.read_json(_CONFIG, max_bytes=_MAX_CONFIG_BYTES)
    if config is None:
        return None
    try:
        return ModelShape.from_config(config)
    except CheckpointError as error:
        folder.problems.append(error.message)
        return None


@dataclass(frozen=True, slots=True)
class _Found:
    """Every tensor by name, every file that holds one, and the names that are refused already."""

    tensors: dict[str, TensorLocation] = field(default_factory=dict)
    files: dict[str, FileState] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)


def _locate_tensors(folder: ModelFolder) -> _Found:
    if folder.has(_SINGLE_FILE):
        return _merge(folder, {_SINGLE_FILE: read_header(folder, _SINGLE_FILE)}, None)
    if not folder.has(_INDEX):
        folder.problems.append(_no_weights(folder))
        return _Found()
    index = folder.read_json(_INDEX, max_bytes=_MAX_INDEX_BYTES)
    if index is None:
        return _Found()
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        folder.problems.append(f"{_INDEX}: weight_map must map tensor names to file names")
        return _Found()
    headers = {file: read_header(folder, file) for file in sorted(set(weight_map.values()))}
    return _merge(folder, headers, weight_map)


def _merge(
    folder: ModelFolder, headers: Mapping[str, Header | None], weight_map: Mapping[str, str] | None
) -> _Found:
    """The headers as one; a tensor that lies in two files is a problem: which is meant?"""
    found = _Found()
    for file, header in headers.items():
        if header is None:
            continue
        found.files[file] = header.state
        found.refused.update(header.refused)
        for name, place in header.tensors.items():
            holder = file if weight_map is None else weight_map.get(name)
            if holder == file:
                found.tensors[name] = place
            elif holder is not None:
                folder.problems.append(
                    f"{file} has tensor {shown(name)} too, which the index places in"
                    f" {shown(holder)}"
                )
    return found


def _no_weights(folder: ModelFolder) -> str:
    found = f"no {_SINGLE_FILE} and no {_INDEX}"
    pickles = sorted(file.name for file in folder.path.glob("*") if is_pickle(file.name))
    if pickles:
        found += f"; {shown(pickles[0])} is a pickle, which can run code: only safetensors are read"
    return found


def _mismatches(shape: ModelShape, found: _Found) -> list[str]:
    problems = []
    for name, expected in tensor_shapes(shape).items():
        place = found.tensors.get(name)
        if name in found.refused:
            continue
        if place is None:
            problems.append(f"tensor {name} is missing")
        elif place.shape != expected:
            problems.append(
                f"{place.file}: tensor {name} must have shape {list(expected)},"
                f" got {list(place.shape)}"
            )
    return problems
