"""Each rank reads its share, says how far it is, and refuses what is not a weight."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.checkpoint import inspect_checkpoint
from serve.errors import CheckpointError
from serve.model.qwen2 import Qwen2Model
from serve.model.tensor_parallel import Collectives
from serve.model.weights import Cut, TensorDestination, load, whole
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


def test_float16_and_bfloat16_checkpoints_are_widened_exactly(
    checkpoint: Callable[..., Path], tmp_path: Path
):
    path = checkpoint(dtype=torch.float16)
    into = torch.empty(64)
    load(inspect_checkpoint(path), [whole("model.norm.weight", TensorDestination(into))])
    stored = load_file(path / "model.safetensors")["model.norm.weight"]
    assert stored.dtype == torch.float16
    assert torch.equal(into, stored.float())
