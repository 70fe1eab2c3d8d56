"""A model folder, looked at without reading a weight: its shape, and where each tensor lies.

Reads `config.json`, the safetensors headers (one file, or several behind an index) and, for the
vocabulary's true size, `tokenizer.json`. Not the loader (`serve.model.weights`), and free of
torch: the planner calls it before anything starts. The one decision behind it: everything in the
folder is untrusted. Sizes are bounded before they are read, paths stay inside the folder, pickles
are refused, and every problem is reported at once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from serve.catalog import ModelShape
from serve.errors import CheckpointError

BYTES_PER_VALUE = {"F32": 4, "BF16": 2, "F16": 2}

_CONFIG = "config.json"
_SINGLE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_INDEX_BYTES = 1 << 25
_MAX_HEADER_BYTES = 1 << 26
_MAX_TOKENIZER_BYTES = 1 << 27
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """One tensor of a checkpoint: its file's name, safetensors dtype and shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor on disk."""
        return math.prod(self.shape) * BYTES_PER_VALUE[self.dtype]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder that passed inspection: every tensor of `shape` is there, in a dtype we read."""

    path: Path
    shape: ModelShape
    tensors: Mapping[str, TensorLocation]


def inspect_checkpoint(path: Path) -> Checkpoint:
    """Look at the model folder `path`; reads headers only, whatever the size of the model.

    Raises:
        CheckpointError: it cannot be used; the message lists every problem, each with the file's
            or the tensor's name.
    """
    folder = Path(path).resolve()
    if not folder.is_dir():
        raise CheckpointError(f"model folder {path} does not exist or is not a folder")
    problems: list[str] = []
    shape = _read_shape(folder, problems)
    tensors = _locate_tensors(folder, problems)
    if shape is not None and tensors:
        problems.extend(_mismatches(shape, tensors))
    if problems or shape is None:
        separator = "\n  " if len(problems) > 1 else " "
        raise CheckpointError(separator.join([f"model folder {path}:", *problems]))
    return Checkpoint(folder, shape, tensors)


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


def count_real_tokens(path: Path) -> int:
    """Ids that the tokenizer can produce: the largest id in `tokenizer.json`, plus one.

    Logits rows from here on are padding, never sampled.

    Raises:
        CheckpointError: the file is missing, too large or not a tokenizer.
    """
    folder = Path(path).resolve()
    problems: list[str] = []
    tokenizer = _read_json(folder, "tokenizer.json", _MAX_TOKENIZER_BYTES, problems)
    if tokenizer is None:
        raise CheckpointError(f"model folder {path}: {problems[0]}")
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
    folder = Path(path).resolve()
    for name in ("generation_config.json", _CONFIG):
        found = (_read_json(folder, name, _MAX_CONFIG_BYTES, []) or {}).get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        if found is None:
            continue
        if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
            raise CheckpointError(f"model folder {path}: {name}: eos_token_id is not an id")
        return tuple(ids)
    return ()


def _read_shape(folder: Path, problems: list[str]) -> ModelShape | None:
    config = _read_json(folder, _CONFIG, _MAX_CONFIG_BYTES, problems)
    if config is None:
        return None
    try:
        return ModelShape.from_config(config)
    except CheckpointError as error:
        problems.append(error.message)
        return None


def _locate_tensors(folder: Path, problems: list[str]) -> dict[str, TensorLocation]:
    if os.path.lexists(folder / _SINGLE_FILE):
        return _read_header(folder, _SINGLE_FILE, problems)
    if not os.path.lexists(folder / _INDEX):
        found = f"no {_SINGLE_FILE} and no {_INDEX}"
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl")
                         for file in folder.glob(pattern))  # fmt: skip
        if pickles:
            found += f"; {pickles[0]} is a pickle, which can run code: only safetensors are read"
        problems.append(found)
        return {}
    index = _read_json(folder, _INDEX, _MAX_INDEX_BYTES, problems)
    if index is None:
        return {}
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        problems.append(f"{_INDEX}: weight_map must map tensor names to file names")
        return {}
    tensors: dict[str, TensorLocation] = {}
    for file in sorted(set(weight_map.values())):
        header = _read_header(folder, file, problems)
        wanted = {name for name, holder in weight_map.items() if holder == file}
        tensors.update({name: place for name, place in header.items() if name in wanted})
    return tensors


def _mismatches(shape: ModelShape, tensors: Mapping[str, TensorLocation]) -> list[str]:
    problems = []
    for name, expected in tensor_shapes(shape).items():
        place = tensors.get(name)
        if place is None:
            problems.append(f"tensor {name} is missing")
        elif place.shape != expected:
            problems.append(
                f"{place.file}: tensor {name} must have shape {list(expected)},"
                f" got {list(place.shape)}"
            )
    return problems


def _read_header(folder: Path, name: str, problems: list[str]) -> dict[str, TensorLocation]:
    """Tensors of one safetensors file: 8 bytes of length, that much JSON, then the data."""
    path = _contained(folder, name, problems)
    if path is None:
        return {}
    try:
        with path.open("rb") as file:
            num_file_bytes = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if num_file_bytes < _LENGTH_BYTES or length > num_file_bytes - _LENGTH_BYTES:
                problems.append(
                    f"{name} is truncated or not safetensors: its header should have"
                    f" {length} bytes, the file has {num_file_bytes}"
                )
                return {}
            if length > _MAX_HEADER_BYTES:
                problems.append(
                    f"{name}: header must be <= {_MAX_HEADER_BYTES} bytes, got {length}"
                )
                return {}
            header = _parse_object(file.read(length))
    except OSError as error:
        problems.append(f"{name} cannot be read: {error.strerror}")
        return {}
    if header is None:
        problems.append(f"{name}: the header is not a JSON object")
        return {}
    return _parse_entries(name, header, num_file_bytes - _LENGTH_BYTES - length, problems)


def _parse_entries(
    file: str, header: Mapping[str, Any], num_data_bytes: int, problems: list[str]
) -> dict[str, TensorLocation]:
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        place = _parse_entry(file, entry)
        if isinstance(place, str):
            problems.append(f"{file}: tensor {name} {place}")
            continue
        start, end = entry["data_offsets"]
        if end - start != place.num_bytes:
            problems.append(
                f"{file}: tensor {name} must have {place.num_bytes} bytes, got {end - start}"
            )
        elif end > num_data_bytes:
            problems.append(
                f"{file} is truncated: tensor {name} ends at byte {end} of the data,"
                f" the file has {num_data_bytes}"
            )
        tensors[name] = place
    return tensors


def _parse_entry(file: str, entry: object) -> TensorLocation | str:
    """The tensor's place, or what is wrong with it."""
    if not isinstance(entry, dict):
        return "has no description"
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        return "has a broken shape or place"
    if offsets[0] > offsets[1]:
        return f"ends at byte {offsets[1]}, before its start at {offsets[0]}"
    if not isinstance(dtype, str) or dtype not in BYTES_PER_VALUE:
        return f"has dtype {str(dtype)[:20]}, must be one of {', '.join(BYTES_PER_VALUE)}"
    return TensorLocation(file, dtype, tuple(shape))


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(item) is int and 0 <= item < 1 << 48 for item in value)
    )


def _contained(folder: Path, name: str, problems: list[str]) -> Path | None:
    """`folder / name` when it is a regular file that really lies in the folder."""
    if name != os.path.basename(name) or name in {"", ".", ".."} or "\0" in name:
        problems.append(f"file name {name!r} leaves the model folder")
        return None
    path = folder / name
    if not os.path.lexists(path):
        problems.append(f"{name} is missing")
        return None
    resolved = path.resolve()
    if not resolved.is_relative_to(folder):
        problems.append(f"{name} is a link that leaves the model folder (to {resolved})")
        return None
    if not resolved.is_file():
        problems.append(f"{name} is not a regular file")
        return None
    return resolved


def _read_json(
    folder: Path, name: str, max_bytes: int, problems: list[str]
) -> dict[str, Any] | None:
    path = _contained(folder, name, problems)
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
    except OSError as error:
        problems.append(f"{name} cannot be read: {error.strerror}")
        return None
    if len(text) > max_bytes:
        problems.append(f"{name} must be <= {max_bytes} bytes")
        return None
    parsed = _parse_object(text)
    if parsed is None:
        problems.append(f"{name} is not a JSON object")
    return parsed


def _parse_object(text: bytes) -> dict[str, Any] | None:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):  # ValueError covers bad JSON, bad UTF-8 and huge integers
        return None
    return parsed if isinstance(parsed, dict) else None
