"""`shoal inspect`, as its user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import cluster.planner.parts
from cluster.cli import app
from cluster.errors import UsageError
from cluster.plan.shapes import published_configs


def inspect(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["inspect", *arguments])


@pytest.fixture
def odd_config(tmp_path: Path) -> Path:
    """A config.json of a shape that nobody has published."""
    path = tmp_path / "config.json"
    config = {**published_configs()["Qwen/Qwen2.5-0.5B-Instruct"], "num_hidden_layers": 3}
    path.write_text(json.dumps(config))
    return path


def test_json_has_the_published_figures_of_the_7b() -> None:
    result = inspect("qwen2.5-7b-instruct", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["parameters"] == 7_615_616_512
    assert report["parameters_without_embeddings"] == 6_525_621_760
    assert report["kv_bytes_per_token_bfloat16"] == 57_344
    assert sum(part["share"] for part in report["parts"]) == pytest.approx(1)
    legal = [entry["size"] for entry in report["tensor_parallel"]["legal"]]
    assert legal == [1, 2, 4]
    assert report["tensor_parallel"]["not_legal"]["8"] == "28 heads are not divisible by 8"
    assert report["accelerate"] is None


def test_table_has_every_part_and_the_rule_that_a_size_breaks() -> None:
    result = inspect("qwen2.5-7b-instruct")
    assert result.exit_code == 0
    for text in ("embedding", "attention", "Q, K, V biases", "MLP", "norms", "LM head"):
        assert text in result.stdout
    assert "6,525,621,760" in result.stdout
    assert "57,344 bytes a token" in result.stdout
    (eight,) = [line for line in result.stdout.splitlines() if line.split()[:1] == ["8"]]
    assert eight.split() == ["8", "no", "yes", "yes", "not", "legal"]


def test_variant_of_math_has_its_own_positions_and_theta() -> None:
    report = json.loads(inspect("Qwen/Qwen2.5-Math-1.5B", "--json").stdout)
    assert (report["max_positions"], report["rope_theta"]) == (4_096, 10_000.0)
    assert (report["tied"], report["vocab_size"]) == (True, 151_936)
    assert report["max_positions_with_yarn"] is None


def test_unknown_shape_is_counted_by_accelerate_without_being_asked(
    odd_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def count(paths: list[Path]) -> list[dict[str, int]]:
        asked.extend(json.loads(path.read_text()) for path in paths)
        return [{"norms": 1}]

    monkeypatch.setattr(cluster.planner.parts, "count_with_accelerate", count)
    result = inspect(str(odd_config))
    assert asked == [json.loads(odd_config.read_text())]
    assert result.exit_code == 1
    assert "accelerate disagrees" in result.stdout
    assert "norms: 6,272 by arithmetic, 1 by accelerate" in result.stdout
    assert inspect(str(odd_config), "--no-verify").exit_code == 0
    assert len(asked) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_accelerate_agrees_on_an_unknown_shape(odd_config: Path) -> None:
    result = inspect(str(odd_config.parent))
    assert result.exit_code == 0
    assert "accelerate counts the same, part by part" in result.stdout


def test_folder_is_refused_for_weights_that_cannot_be_served_and_its_config_alone_is_not(
    odd_config: Path,
) -> None:
    (odd_config.parent / "model.safetensors").write_bytes(b"")
    result = inspect(str(odd_config.parent))
    assert isinstance(result.exception, UsageError)
    assert "model.safetensors is truncated or not safetensors" in result.exception.message
    assert f"Give {odd_config} to leave the weights aside" in result.exception.message
    assert inspect(str(odd_config), "--no-verify").exit_code == 0


def test_weights_are_no_model_by_themselves(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(2 << 20))
    result = inspect(str(path))
    assert isinstance(result.exception, UsageError)
    assert "model.safetensors is no config.json" in result.exception.message


def test_unknown_name_is_refused_with_what_there_is() -> None:
    result = inspect("qwen3-7b")
    assert isinstance(result.exception, UsageError)
    assert "A model is a preset (demo, " in result.exception.message
