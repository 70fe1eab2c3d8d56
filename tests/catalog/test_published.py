"""The published shapes: exact figures, variants, and accelerate as the twin that counts them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.plan import preset_names
from cluster.plan.shapes import preset_shape, published_configs, published_shape
from cluster.planner.parts import count_with_accelerate, differences, parts_of
from cluster.planner.subjects import find_subject
from serve.catalog import ModelShape, is_stretchable, legal_tensor_parallel_sizes
from serve.errors import CheckpointError, ConfigurationError

SIZES = ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")


@pytest.mark.parametrize(
    ("size", "total", "non_embedding", "biases", "kv_bytes"),
    [
        ("0.5B", 494_032_768, 357_898_112, 27_648, 12_288),
        ("7B", 7_615_616_512, 6_525_621_760, 129_024, 57_344),
        ("72B", 72_706_203_648, 70_214_787_072, 819_200, 327_680),
    ],
)
def test_published_shape_gives_the_published_figures(
    size: str, total: int, non_embedding: int, biases: int, kv_bytes: int
) -> None:
    shape = preset_shape(f"qwen2.5-{size.lower()}-instruct")
    assert shape is not None
    parts = {part.name: part for part in parts_of(shape)}
    assert shape.num_params == sum(part.num_params for part in parts.values()) == total
    assert sum(p.num_params for p in parts.values() if not p.is_embedding) == non_embedding
    assert parts["Q, K, V biases"].num_params == biases
    assert shape.kv_bytes_per_token(bytes_per_value=2) == kv_bytes


@pytest.mark.parametrize("name", [name for name in preset_names("models") if name != "demo"])
def test_parts_add_up_for_every_preset(name: str) -> None:
    shape = find_subject(name).shape
    parts = parts_of(shape)
    assert sum(part.num_params for part in parts) == shape.num_params
    without = sum(part.num_params for part in parts if not part.is_embedding)
    assert without == shape.num_non_embedding_params


def test_variants_of_a_size_differ_only_in_positions_and_theta() -> None:
    counts: dict[str, set[int]] = {size: set() for size in SIZES}
    for name, config in published_configs().items():
        size = next(size for size in SIZES if f"-{size}" in name)
        shape = ModelShape.from_config(config)
        counts[size].add(shape.num_params)
        is_math = "Math" in name
        assert shape.rope_theta == (1e4 if is_math else 1e6)
        assert (shape.max_positions == 4_096) == is_math
    assert all(len(found) == 1 for found in counts.values())
    assert len(published_configs()) == 7 + 7 + 6 + 6 + 3 + 3


def test_only_instruct_and_coder_shapes_of_7b_and_more_stretch() -> None:
    stretchable = {
        name
        for name, config in published_configs().items()
        if is_stretchable(ModelShape.from_config(config))
    }
    assert stretchable == {
        *(f"Qwen/Qwen2.5-{size}-Instruct" for size in SIZES[3:]),
        *(f"Qwen/Qwen2.5-Coder-{size}{end}" for size in SIZES[3:6] for end in ("", "-Instruct")),
    }


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b-instruct", "qwen/qwen2.5-7b-INSTRUCT"]
)
def test_repository_is_found_in_any_case_with_or_without_owner(name: str) -> None:
    shape = published_shape(name)
    assert shape is not None
    assert legal_tensor_parallel_sizes(shape) == [1, 2, 4]


def test_every_preset_names_a_repository_that_is_known() -> None:
    names = [name for name in preset_names("models") if name != "demo"]
    assert len(names) == len(SIZES)
    assert all(find_subject(name).model.repository in published_configs() for name in names)


def test_unknown_model_is_told_with_the_nearest_name_and_all_presets() -> None:
    with pytest.raises(ConfigurationError, match=r"did you mean 'qwen2\.5-7b-instruct'") as caught:
        find_subject("qwen2.5-7b-instrct")
    assert "qwen2.5-72b-instruct" in caught.value.message


def test_config_json_alone_is_enough_and_marked_unknown_if_it_is(tmp_path: Path) -> None:
    config = {**published_configs()["Qwen/Qwen2.5-Coder-7B"], "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not find_subject(str(tmp_path)).is_unknown
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps({**config, "num_hidden_layers": 5}))
    subject = find_subject(str(odd))
    assert (subject.is_unknown, subject.title, subject.shape.num_layers) == (True, "odd", 5)


@pytest.mark.parametrize("text", ["", "[]", '{"model_type": "llama"}', "\x00"])
def test_file_that_is_no_config_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        find_subject(str(path))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_accelerate_counts_the_same_part_by_part_for_all_sizes_and_an_odd_one(
    tmp_path: Path,
) -> None:
    configs = [published_configs()[f"Qwen/Qwen2.5-{size}-Instruct"] for size in SIZES]
    configs.append({**configs[0], "num_attention_heads": 7, "num_key_value_heads": 7})
    paths = [tmp_path / f"{index}.json" for index in range(len(configs))]
    for path, config in zip(paths, configs, strict=True):
        path.write_text(json.dumps(dict(config)))
    counts = count_with_accelerate(paths)
    assert len(counts) == len(configs)
    for config, counted in zip(configs, counts, strict=True):
        assert differences(parts_of(ModelShape.from_config(config)), counted) == []


def test_difference_names_the_part_and_both_counts() -> None:
    shape = find_subject("qwen2.5-0.5b-instruct").shape
    counts = {part.name: part.num_params for part in parts_of(shape)}
    assert differences(parts_of(shape), counts | {"norms": 7}) == [
        "norms: 43,904 by arithmetic, 7 by accelerate"
    ]
