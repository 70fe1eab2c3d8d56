"""What a replica writes of its start is what `shoal status` reads."""

from __future__ import annotations

from pathlib import Path

from cluster.local.progress import LoadProgress, kernels_of
from serve.messages import ShardProgress
from serve.replica.progress import ProgressFile


def test_kernels_of_a_models_ready_replicas_are_told_and_of_no_other_model(tmp_path: Path) -> None:
    ProgressFile(tmp_path, "qwen-a1").ready(kernels={"avx2"})
    ProgressFile(tmp_path, "qwen-b2").ready(kernels={"amx", "avx2"})
    ProgressFile(tmp_path, "qwen-small-c3").ready(kernels={"torch"})
    ProgressFile(tmp_path, "stand-in-d4").ready(kernels={""})
    assert kernels_of(tmp_path, "qwen") == ["amx", "avx2"]
    assert kernels_of(tmp_path, "qwen-small") == ["torch"]
    assert kernels_of(tmp_path, "stand-in") == kernels_of(tmp_path, "other") == []


def test_replica_that_loads_again_tells_no_kernels_until_it_is_ready(tmp_path: Path) -> None:
    file = ProgressFile(tmp_path, "qwen-a1")
    file.ready(kernels={"avx2"})
    file.update(ShardProgress(0, "weights", 5, 10))
    assert kernels_of(tmp_path, "qwen") == []
    progress = LoadProgress.read(tmp_path)
    assert (progress.num_files, progress.num_bytes, progress.num_total_bytes) == (1, 5, 10)


def test_file_that_is_none_of_a_replicas_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "qwen-a1.json").write_text("[]")
    (tmp_path / "qwen-b2.json").write_text("{")
    (tmp_path / "qwen-c3.json").write_text("{}")
    assert kernels_of(tmp_path, "qwen") == []
