"""Each rank reads its share, says how far it is, and refuses what is not a weight."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import serve.demo
from serve.checkpoint import Checkpoint, FileState, TensorLocation, inspect_checkpoint
from serve.checkpoint.folder import ModelFolder
from serve.checkpoint.header import read_header
from serve.errors import CheckpointError
from serve.kernels.dtypes import DtypeName, Stored
from serve.model.qwen2 import Qwen2Model
from serve.model.tensor_destination import TensorDestination
from serve.model.tensor_parallel import Collectives
from serve.model.weights import PIECE_ROWS, Cut, VectorDestination, load, whole
from serve.testing.ranks import run_ranks

OPTIONS = {"num_heads": 28, "num_kv_heads": 4, "ffn": 128, "is_tied": False, "vocab_size": 256}


def _model(path: Path, rank: Collectives, dtype: torch.dtype = torch.float32) -> Qwen2Model:
    shape = inspect_checkpoint(path).shape
    return Qwen2Model(shape, rank, dtype=dtype, num_positions=16)


def _read(path: Path, rank: Collectives) -> list[tuple[int, int]]:
    progress: list[tuple[int, int]] = []
    num_bytes = load(
        inspect_checkpoint(path), _model(path, rank).cuts(), lambda *now: progress.append(now)
    )
    assert progress[-1] == (num_bytes, num_bytes)
    assert len({total for _, total in progress}) == 1
    assert [done for done, _ in progress] == sorted({done for done, _ in progress})
    return progress


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_rank_reads_about_its_share_of_the_bytes(checkpoint: Callable[..., Path], size: int):
    path = checkpoint(**OPTIONS)
    num_all_bytes = inspect_checkpoint(path).shape.num_params * 4
    shares = [
        progress[-1][0] / num_all_bytes for progress in run_ranks(size, lambda r: _read(path, r))
    ]
    assert all(1 / size <= share <= 1.02 / size for share in shares)
    assert size > 1 or shares == [1.0]


def test_every_value_is_read_by_some_rank_and_only_norms_and_copied_heads_twice(
    checkpoint: Callable[..., Path],
):
    path = checkpoint(num_heads=12, num_kv_heads=2)
    shape = inspect_checkpoint(path).shape
    counts = {
        name: torch.zeros(place.shape) for name, place in inspect_checkpoint(path).tensors.items()
    }
    for cuts in run_ranks(4, lambda rank: list(_model(path, rank).cuts())):
        for cut in cuts:
            counts[cut.name][tuple(slice(*limits) for limits in cut.ranges)] += 1
    for name, count in counts.items():
        times = 4 if "norm" in name else 2 if "k_proj" in name or "v_proj" in name else 1
        assert (count == times).all(), name
    assert shape.num_kv_heads == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_refused_by_name(
    checkpoint: Callable[..., Path], tmp_path: Path, value: float
):
    path = Path(shutil.copytree(checkpoint(), tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_file(tensors, path / "model.safetensors")
    name = r"model\.layers\.1\.mlp\.down_proj\.weight has values that are not finite"
    with pytest.raises(CheckpointError, match=name):
        run_ranks(1, lambda rank: _read(path, rank))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_vector_with_a_value_that_is_not_finite_is_refused_by_name(
    checkpoint: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
):
    path = Path(shutil.copytree(checkpoint(), tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    tensors["model.norm.weight"][-1] = float("-inf")
    save_file(tensors, path / "model.safetensors")
    into = VectorDestination(np.empty(64, np.float32))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has values that are not"):
        load(inspect_checkpoint(path), [whole("model.norm.weight", into)])


def test_a_cut_of_an_absent_tensor_or_range_is_refused_by_name(checkpoint: Callable[..., Path]):
    found = inspect_checkpoint(checkpoint())
    with pytest.raises(CheckpointError, match="tensor absent is missing"):
        load(found, [whole("absent", TensorDestination(torch.empty(3)))])
    norm = Cut("model.norm.weight", ((60, 70),), TensorDestination(torch.empty(10)))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[64\], too small"):
        load(found, [norm])


def test_a_file_that_changed_after_inspection_is_refused_by_name(
    checkpoint: Callable[..., Path], tmp_path: Path
):
    path = Path(shutil.copytree(checkpoint(), tmp_path / "model"))
    found, (first, *_) = inspect_checkpoint(path), list(run_ranks(1, lambda r: _model(path, r)))
    (path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .* cannot be read"):
        load(found, first.cuts())


class _Watched:
    """A destination that keeps nothing but what it was given, and does something at a row."""

    num_bytes = 0

    def __init__(self, shape: tuple[int, ...], at: Callable[[int], object] = bool) -> None:
        self.shape = shape
        self.rows: list[tuple[int, int]] = []
        self._at = at

    def fill(self, source: Stored, first_row: int) -> bool:
        self.rows.append((first_row, len(source)))
        self._at(first_row)
        return True


@pytest.fixture(scope="module")
def tall(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """One tensor of 256 MB, a hole on the disk, in a file of an odd header length."""
    folder = tmp_path_factory.mktemp("tall")
    shape = (1 << 20, 64)
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 1 << 28]}
    header = json.dumps({"tall": entry}).encode()
    with (folder / "tall.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + (1 << 28))
        state = FileState.of(os.fstat(file.fileno()))
    place = TensorLocation("tall.safetensors", "F32", shape, 8 + len(header))
    some_shape = inspect_checkpoint(Path(serve.demo.__file__).parent).shape
    return Checkpoint(folder, some_shape, {"tall": place}, {"tall.safetensors": state})


def test_a_large_tensor_arrives_in_whole_panels_and_never_lies_in_memory(tall: Checkpoint):
    process = psutil.Process()
    sizes = [process.memory_info().rss]
    into = _Watched((1 << 20, 64), lambda _: sizes.append(process.memory_info().rss))
    assert load(tall, [whole("tall", into)]) == 1 << 28
    assert [row for row, _ in into.rows] == [sum(size for _, size in into.rows[:index])
                                             for index in range(len(into.rows))]  # fmt: skip
    assert sum(size for _, size in into.rows) == 1 << 20
    assert all(row % PIECE_ROWS == 0 for row, _ in into.rows)
    assert max(sizes) - sizes[0] < 120e6


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: os.truncate(path, 1 << 27), "the file (ends before it|has changed)"),
        (lambda path: os.utime(path, ns=(0, 0)), "the file has changed since its header was read"),
    ],
)
def test_a_file_that_changes_while_it_is_read_is_refused_by_name(
    tall: Checkpoint, change: Callable[[Path], object], reason: str
):
    path = tall.path / "tall.safetensors"
    before = path.stat()
    into = _Watched((1 << 20, 64), lambda row: change(path) if row == 0 else None)
    try:
        with pytest.raises(CheckpointError, match=f"tall.safetensors: tensor tall .* {reason}"):
            load(tall, [whole("tall", into)])
    finally:
        os.truncate(path, before.st_size)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_file_replaced_since_inspection_is_refused_by_name(
    checkpoint: Callable[..., Path], tmp_path: Path
):
    path = Path(shutil.copytree(checkpoint(), tmp_path / "model"))
    found = inspect_checkpoint(path)
    shutil.copy2(path / "model.safetensors", tmp_path / "same")
    (tmp_path / "same").replace(path / "model.safetensors")
    norm = whole("model.norm.weight", _Watched((64,)))
    with pytest.raises(CheckpointError, match="the file has changed"):
        load(found, [norm])


def test_pieces_come_in_the_order_of_the_files_and_each_files_bytes(
    checkpoint: Callable[..., Path],
):
    found = inspect_checkpoint(checkpoint(max_shard_size="60KB", is_tied=False, num_layers=3))
    seen: list[tuple[str, int]] = []
    cuts = [
        whole(name, _Watched(place.shape, lambda _, at=(place.file, place.start): seen.append(at)))
        for name, place in sorted(found.tensors.items(), reverse=True)
    ]
    load(found, cuts)
    assert seen == sorted((place.file, place.start) for place in found.tensors.values())
    assert len({file for file, _ in seen}) > 2


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_any_cut_is_what_safetensors_own_reader_gives(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: torch.dtype
):
    folder = tmp_path_factory.mktemp("cut")
    shape = data.draw(
        st.tuples(st.integers(1, 600), st.integers(1, 9)) | st.tuples(st.integers(1, 600))
    )
    odd = {"odd": torch.zeros(3), "tensor": torch.randn(shape).to(dtype)}
    save_file(odd, folder / "model.safetensors", metadata={"x": "y" * data.draw(st.integers(0, 8))})
    ranges = tuple(tuple(sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))))
                   for size in shape)  # fmt: skip
    model_folder = ModelFolder(folder)
    header = read_header(model_folder, "model.safetensors")
    assert header is not None
    shape_of_some = inspect_checkpoint(Path(serve.demo.__file__).parent).shape
    found = Checkpoint(folder, shape_of_some, header.tensors, {"model.safetensors": header.state})
    into = torch.empty([end - start for start, end in ranges])
    with mock.patch("serve.model.weights._PIECE_BYTES", 1 << 10):
        load(found, [Cut("tensor", ranges, TensorDestination(into))])
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        expected = file.get_slice("tensor")[tuple(slice(*limits) for limits in ranges)]
    assert torch.equal(into, expected.float())
    if len(shape) == 1:
        vector = np.empty(len(into), np.float32)
        load(found, [Cut("tensor", ranges, VectorDestination(vector))])
        assert torch.equal(torch.from_numpy(vector), into)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float16_and_bfloat16_checkpoints_are_widened_exactly(
    checkpoint: Callable[..., Path], dtype: DtypeName
):
    path = checkpoint(dtype=dtype)
    into = torch.empty(64)
    load(inspect_checkpoint(path), [whole("model.norm.weight", TensorDestination(into))])
    stored = load_file(path / "model.safetensors")["model.norm.weight"]
    assert stored.dtype == getattr(torch, dtype)
    assert torch.equal(into, stored.float())
