"""A model folder is looked at without trusting it: what is damaged is named, all of it at once."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve.checkpoint import (
    BYTES_PER_VALUE,
    count_real_tokens,
    inspect_checkpoint,
    read_eos_token_ids,
    tensor_shapes,
)
from serve.errors import CheckpointError
from serve.testing.checkpoints import make_checkpoint, write_tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), num_layers=1)


@pytest.fixture(scope="module")
def pristine_split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    return make_checkpoint(folder, num_layers=2, is_tied=False, max_shard_size="40KB")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def split_folder(pristine_split: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine_split, tmp_path / "model"))


def _read_header(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _edit_header(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    header, data = _read_header(folder / WEIGHTS)
    edit(header)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def _edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def _refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        inspect_checkpoint(folder)
    return str(caught.value)


def test_a_whole_folder_gives_its_shape_and_every_tensor(folder: Path):
    checkpoint = inspect_checkpoint(folder)
    expected = tensor_shapes(checkpoint.shape)
    assert {name: checkpoint.tensors[name].shape for name in expected} == expected
    num_values = sum(
        checkpoint.tensors[name].num_bytes // BYTES_PER_VALUE["F32"] for name in expected
    )
    assert num_values == checkpoint.shape.num_params


def test_an_index_with_several_files_is_read(split_folder: Path):
    checkpoint = inspect_checkpoint(split_folder)
    assert len({place.file for place in checkpoint.tensors.values()}) > 2
    assert set(checkpoint.tensors) >= set(tensor_shapes(checkpoint.shape))


def _offset(index: int, value: int) -> Callable[[dict[str, Any]], object]:
    def edit(header: dict[str, Any]) -> None:
        header["model.norm.weight"]["data_offsets"][index] = value

    return edit


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["model.norm.weight"].update({key: value})


HEADER_DAMAGE: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda header: header.pop("model.norm.weight"), "tensor model.norm.weight is missing"),
    (_set("dtype", "I8"), "tensor model.norm.weight has dtype I8, must be one of F32, BF16, F16"),
    (_set("dtype", ["F32"]), "tensor model.norm.weight has dtype"),
    (_set("dtype", "BF16"), "tensor model.norm.weight must have 128 bytes, got 256"),
    (_set("shape", [32]), "tensor model.norm.weight must have 128 bytes, got 256"),
    (_set("shape", [8, 8]), "tensor model.norm.weight must have shape [64], got [8, 8]"),
    (_set("shape", [-64]), "tensor model.norm.weight has a broken shape"),
    (_set("shape", "64"), "tensor model.norm.weight has a broken shape"),
    (_set("shape", [1 << 60]), "tensor model.norm.weight has a broken shape"),
    (_set("data_offsets", None), "tensor model.norm.weight has a broken shape or place"),
    (_set("data_offsets", [0]), "tensor model.norm.weight has a broken shape or place"),
    (_set("data_offsets", [1 << 40, (1 << 40) + 256]), "is truncated: tensor model.norm.weight"),
    (_offset(0, 1 << 41), "before its start"),
    (lambda header: header.update({"model.norm.weight": 7}), "has no description"),
]


@pytest.mark.parametrize(("edit", "reason"), HEADER_DAMAGE)
def test_a_damaged_header_is_refused_with_file_and_tensor(folder, edit, reason):
    _edit_header(folder, edit)
    message = _refusal(folder)
    assert reason in message
    assert "model.norm.weight" in message


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def _remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _replace_by_link(name: str, target: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.symlink(target, folder / name)

    return damage


def _replace_by_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def _truncate(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1000)


FILE_DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (_remove("config.json"), "config.json is missing"),
    (_write("config.json", b"[]"), "config.json is not a JSON object"),
    (_write("config.json", b"{"), "config.json is not a JSON object"),
    (_write("config.json", b"\xff\xfe{}"), "config.json is not a JSON object"),
    (_write("config.json", b"[" * 100_000), "config.json is not a JSON object"),
    (_write("config.json", b" " * (1 << 20) + b"{}"), "config.json must be <= 1048576 bytes"),
    (_remove(WEIGHTS), "no model.safetensors and no model.safetensors.index.json"),
    (_replace_by_pickle, "pytorch_model.bin is a pickle, which can run code"),
    (_truncate, "model.safetensors is truncated: tensor"),
    (_write(WEIGHTS, b""), "model.safetensors is truncated or not safetensors"),
    (_write(WEIGHTS, b"\xff" * 64), "model.safetensors is truncated or not safetensors"),
    (_write(WEIGHTS, struct.pack("<Q", 2) + b"[]"), "model.safetensors: the header is not"),
    (_write(WEIGHTS, struct.pack("<Q", 4) + b"nope"), "model.safetensors: the header is not"),
    (_replace_by_link(WEIGHTS, "/dev/zero"), "model.safetensors is a link that leaves"),
    (_replace_by_link("config.json", "/etc/hostname"), "config.json is a link that leaves"),
]


@pytest.mark.parametrize(("damage", "reason"), FILE_DAMAGE)
def test_a_damaged_file_is_refused_by_name(folder, damage, reason):
    damage(folder)
    assert reason in _refusal(folder)


def test_a_header_larger_than_the_bound_is_not_read(folder: Path):
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 1 << 27))
        file.truncate((1 << 27) + 100)  # sparse
    assert "header must be <= 67108864 bytes, got 134217728" in _refusal(folder)


def test_a_link_inside_the_folder_is_followed(folder: Path):
    (folder / WEIGHTS).rename(folder / "blob")
    os.symlink("blob", folder / WEIGHTS)
    assert inspect_checkpoint(folder).shape.num_layers == 1


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("../outside.safetensors", "leaves the model folder"),
        ("/etc/passwd", "leaves the model folder"),
        ("..", "leaves the model folder"),
        ("a\0b", "leaves the model folder"),
        ("absent.safetensors", "absent.safetensors is missing"),
    ],
)
def test_an_index_that_names_another_place_is_refused(split_folder, file, reason):
    _edit_json(
        split_folder / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": file})
    )
    message = _refusal(split_folder)
    assert reason in message
    assert "tensor model.norm.weight is missing" in message


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}])
def test_an_index_without_a_map_is_refused(split_folder, weight_map):
    _edit_json(split_folder / INDEX, lambda index: index.update(weight_map=weight_map))
    assert "weight_map must map tensor names to file names" in _refusal(split_folder)


def test_every_problem_is_listed_at_once(folder: Path):
    def damage(header: dict[str, Any]) -> None:
        del header["model.norm.weight"]
        header["model.layers.0.mlp.up_proj.weight"]["dtype"] = "I64"
        header["model.layers.0.self_attn.q_proj.weight"]["shape"] = [4096]

    _edit_header(folder, damage)
    _edit_json(folder / "config.json", lambda config: config.update(hidden_act="relu"))
    message = _refusal(folder)
    assert "hidden_act" in message
    assert "up_proj.weight has dtype I64" in message
    _edit_json(folder / "config.json", lambda config: config.update(hidden_act="silu"))
    message = _refusal(folder)
    for name in ("model.norm.weight is missing", "up_proj.weight", "q_proj.weight must have shape"):
        assert name in message


@pytest.mark.parametrize("name", ["absent", "file"])
def test_what_is_no_folder_is_refused(tmp_path: Path, name: str):
    (tmp_path / "file").write_text("")
    assert "does not exist or is not a folder" in _refusal(tmp_path / name)


def test_real_tokens_are_the_largest_id_of_vocabulary_and_added_tokens_plus_one(tmp_path: Path):
    write_tokenizer(tmp_path, num_real_tokens=100)
    assert count_real_tokens(tmp_path) == 100
    _edit_json(
        tmp_path / "tokenizer.json",
        lambda tokenizer: tokenizer.update(added_tokens=[{"id": 104, "content": "<|im_end|>"}]),
    )
    assert count_real_tokens(tmp_path) == 105


@pytest.mark.parametrize("content", [None, "{}", "[]", '{"model": {"vocab": {"a": "b"}}}', "x"])
def test_a_broken_tokenizer_is_refused(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        count_real_tokens(tmp_path)


def test_end_ids_come_from_the_generation_config_first(folder: Path):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert read_eos_token_ids(folder) == (7, 9)
    (folder / "generation_config.json").unlink()
    assert read_eos_token_ids(folder) == (130,)
