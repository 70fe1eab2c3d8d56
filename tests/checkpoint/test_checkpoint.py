"""A model folder is looked at without trusting it: what is damaged is named, all of it at once."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import serve.demo
from serve.checkpoint import (
    BYTES_PER_VALUE,
    count_real_tokens,
    inspect_checkpoint,
    read_eos_token_ids,
    tensor_shapes,
)
from serve.errors import CheckpointError
from serve.testing.checkpoints import make_checkpoint, write_tokenizer
from serve.text.tokenizer import load_tokenizer

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


def _move(num_bytes: int) -> Callable[[dict[str, Any]], object]:
    def edit(header: dict[str, Any]) -> None:
        offsets = header["model.norm.weight"]["data_offsets"]
        offsets[:] = [offset + num_bytes for offset in offsets]

    return edit


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
    (_set("dtype", "F8_E4M3"), "tensor model.norm.weight has dtype F8_E4M3, must be one of"),
    (_move(-4), "tensor model.norm.weight overlaps model.layers.0"),
    (_move(4), "is truncated: tensor model.norm.weight ends at byte"),
    (
        lambda header: header.update(
            {
                "model.norm.weight": {**header["model.norm.weight"]},
                "copy": header["model.norm.weight"],
            }
        ),
        "tensor copy overlaps model.norm.weight",
    ),
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


@pytest.mark.parametrize("suffix", ["bin", "ckpt", "pkl", "pt", "pth"])
def test_weights_that_are_only_a_pickle_are_refused_by_name(folder: Path, suffix: str):
    (folder / WEIGHTS).rename(folder / f"weights.{suffix}")
    assert f"weights.{suffix} is a pickle, which can run code" in _refusal(folder)


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
    assert "header must be <= 16777216 bytes, got 134217728" in _refusal(folder)


def _hub_cache(pristine: Path, root: Path) -> tuple[Path, Path]:
    """A snapshot as the hub's own client keeps it: names that are links to blobs."""
    repository = root / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    demo = Path(serve.demo.__file__).parent
    for file in (*pristine.iterdir(), demo / "tokenizer.json", demo / "tokenizer_config.json"):
        shutil.copy(file, blobs / f"digest-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/digest-of-{file.name}")
    return snapshot, blobs


def test_links_of_a_hubs_cache_are_followed_to_its_blobs_and_nowhere_else(
    pristine: Path, tmp_path: Path
):
    snapshot, blobs = _hub_cache(pristine, tmp_path)
    assert inspect_checkpoint(snapshot).shape.num_layers == 1
    assert load_tokenizer(snapshot).num_real_tokens == count_real_tokens(snapshot)
    (blobs / f"digest-of-{WEIGHTS}").rename(tmp_path / "elsewhere")
    (blobs / f"digest-of-{WEIGHTS}").symlink_to(tmp_path / "elsewhere")
    assert "model.safetensors is a link that leaves the model folder" in _refusal(snapshot)


def test_a_folder_that_is_no_snapshot_may_not_link_to_blobs(pristine: Path, tmp_path: Path):
    snapshot, _ = _hub_cache(pristine, tmp_path)
    other = snapshot.parent.rename(snapshot.parent.with_name("copies")) / snapshot.name
    assert "model.safetensors is a link that leaves the model folder" in _refusal(other)


@pytest.mark.parametrize("target", ["model.safetensors", "absent"])
def test_a_ring_of_links_and_a_broken_one_are_refused(folder: Path, target: str):
    _replace_by_link(WEIGHTS, target)(folder)
    assert "model.safetensors" in _refusal(folder)


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


def test_a_tensor_in_two_files_is_refused_by_name(split_folder: Path):
    index = json.loads((split_folder / INDEX).read_text())["weight_map"]
    holders = list(index.values())
    name, first = next(entry for entry in index.items() if holders.count(entry[1]) > 1)
    other = next(file for file in holders if file != first)
    _edit_json(split_folder / INDEX, lambda index: index["weight_map"].update({name: other}))
    assert f"{first} has tensor {name} too, which the index places in {other}" in _refusal(
        split_folder
    )


def _write_header(folder: Path, text: bytes, data: bytes = b"") -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_a_tensor_described_twice_is_refused_by_name(folder: Path):
    entry = b'"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
    _write_header(folder, b"{%s, %s}" % (entry, entry))
    assert "model.safetensors: the header describes a twice" in _refusal(folder)


def test_bytes_that_belong_to_no_tensor_are_refused(folder: Path):
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"more")
    assert "model.safetensors has 4 bytes that belong to no tensor" in _refusal(folder)


def test_a_hole_between_tensors_is_refused(folder: Path):
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [start, start + 4]}
              for name, start in (("a", 0), ("b", 8))}  # fmt: skip
    _write_header(folder, json.dumps(header).encode(), bytes(12))
    assert "tensor b does not begin at the end of a" in _refusal(folder)


def test_names_are_shown_short_and_without_what_a_terminal_obeys(folder: Path):
    header = dict.fromkeys(["\x1b[2J", "\ud800", "a" * 9000], 7)
    _write_header(folder, json.dumps(header).encode())
    message = _refusal(folder)
    assert message.replace("\n", "").isprintable()
    assert r"'\x1b[2J'" in message
    assert len(message) < 4000


def test_only_the_first_problems_of_very_many_are_listed(folder: Path):
    _write_header(folder, json.dumps({f"t{index}": 7 for index in range(5000)}).encode())
    message = _refusal(folder)
    assert "more" in message.splitlines()[-1]
    assert len(message.splitlines()) == 22


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
_PLACE = st.lists(st.integers(-1, 300) | st.sampled_from([1 << 40, 1 << 63, 1 << 80]), max_size=3)
_ENTRY = _JSON | st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "I8", "F8_E5M2", "", None]),
        "shape": _PLACE | _JSON,
        "data_offsets": _PLACE | _JSON,
    }
)
_CONFIG_KEYS = [
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "rope_scaling",
    "architectures",
    "quantization_config",
]
_HEADER = st.dictionaries(
    st.sampled_from(["model.norm.weight", "a"]) | st.text(), _ENTRY, max_size=4
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(_HEADER.map(lambda header: json.dumps(header).encode()) | st.binary(max_size=64),
       st.none() | st.integers(0, 1 << 64), st.binary(max_size=300))  # fmt: skip
def test_whatever_a_header_says_the_folder_is_refused_in_printable_words(
    folder: Path, text: bytes, length: int | None, data: bytes
):
    claimed = len(text) if length is None else min(length, (1 << 64) - 1)
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", claimed) + text + data)
    _refusal(folder).encode()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.sampled_from(_CONFIG_KEYS), _JSON, min_size=1))
def test_whatever_a_configuration_says_the_folder_is_read_or_refused(
    folder: Path, pristine: Path, values: dict[str, Any]
):
    shutil.copy(pristine / "config.json", folder / "config.json")
    _edit_json(folder / "config.json", lambda config: config.update(values))
    with contextlib.suppress(CheckpointError):
        inspect_checkpoint(folder)


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


def test_what_is_no_folder_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert "does not exist or is not a folder" in _refusal(tmp_path / "absent")
    assert "file is a file: give the folder with config.json" in _refusal(tmp_path / "file")


def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(folder: Path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1000\n"
    (folder / WEIGHTS).write_bytes(pointer)
    assert "model.safetensors is a pointer of Git LFS, not the file" in _refusal(folder)


def test_a_tensor_that_cannot_be_read_is_not_called_missing_too(folder: Path):
    _edit_header(folder, _set("dtype", "I8"))
    assert "missing" not in _refusal(folder)


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
