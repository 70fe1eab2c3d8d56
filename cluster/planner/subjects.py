"""Which model is meant: a preset, a folder, a config.json, or a published repository.

Not the plan. The one decision: a model's shape is enough for all that is asked here, so weights are
never needed; but a folder that has some which cannot be served is refused, by their headers.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.plan import DEMO_MODEL_PATH, DEMO_PRESET, preset_names
from cluster.plan.presets import read_preset
from cluster.plan.shapes import published_configs, published_shape
from serve.catalog import ModelShape
from serve.checkpoint import inspect_checkpoint, is_pickle
from serve.config import ModelConfig, ShoalConfig
from serve.errors import CheckpointError, ConfigurationError

_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Subject:
    """One model to inspect or plan.

    `origin` tells where the shape is from, in words; `config` is what its config.json says.
    `is_unknown`: its tensors are not those of a published model, whose counts are known.
    """

    title: str
    shape: ModelShape
    origin: str
    model: ModelConfig
    config: Mapping[str, Any]
    is_unknown: bool = False


def find_subject(text: str) -> Subject:
    """The model that a user names.

    Raises:
        ConfigurationError: nothing of that name; the message says what there is.
        CheckpointError: a config.json that we cannot run, or a folder's weights.
    """
    if text in preset_names("models"):
        return _preset(text)
    path = Path(text).expanduser()
    if path.is_dir() or path.is_file():
        subject = _from_files(path)
        _check_weights(path)
        return subject
    shape = published_shape(text)
    if shape is not None:
        names = published_configs()
        name = next(name for name in names if text.lower() in (name.lower(), _short(name)))
        model = ModelConfig(name=_short(name), repository=name)
        return Subject(name, shape, "its published config.json", model, names[name])
    raise ConfigurationError(_unknown(text))


def subjects_of(config: ShoalConfig) -> list[Subject]:
    """The models of a configuration, in its order; those without a shape (stand-ins) left out.

    Raises:
        ConfigurationError: a model that has neither a folder nor a published shape.
    """
    return [subject_of(model) for model in config.models if model.stand_in is None]


def subject_of(model: ModelConfig) -> Subject:
    """The model of one entry of a configuration.

    Raises:
        ConfigurationError: it has neither a folder nor a published shape.
    """
    if model.path is not None:
        found = _from_files(model.path)
        return replace(found, title=model.name or found.title, model=model)
    if model.preset is not None:
        found = _preset(model.preset)
    elif model.repository and published_shape(model.repository):
        found = find_subject(model.repository)
    else:
        raise ConfigurationError(
            f"model {model.name!r}: its shape is not known; give the folder with its config.json as"
            " `path:`"
        )
    return replace(found, title=model.name or found.title, model=model)


def _preset(name: str) -> Subject:
    document = read_preset("models", name)
    assert document is not None, "the name is one of preset_names"
    model = ModelConfig.model_validate({**document.values, "preset": name})
    if name == DEMO_PRESET:
        found = _from_files(DEMO_MODEL_PATH)
        origin = "the files that ship with Shoal"
        return replace(found, title=name, origin=origin, model=model, is_unknown=False)
    assert model.repository is not None, "every preset but the demo names its repository"
    found = find_subject(model.repository)
    return replace(found, title=name, origin=f"{found.title}'s published config.json", model=model)


def _from_files(path: Path) -> Subject:
    file = path / "config.json" if path.is_dir() else path
    config = _read_json(file)
    shape = ModelShape.from_config(config)
    folder = file.resolve().parent
    return Subject(
        title=folder.name if file.name == "config.json" else file.stem,
        shape=shape,
        origin=str(file),
        model=ModelConfig(name=folder.name.lower() or None),
        config=config,
        is_unknown=_tensors(shape) not in _published_tensors(),
    )


def _check_weights(path: Path) -> None:
    """Nothing where `path` is a folder without weights, or is no folder."""
    if not any(is_pickle(file.name) or ".safetensors" in file.name for file in path.glob("*")):
        return
    try:
        inspect_checkpoint(path)
    except CheckpointError as exc:
        alone = path / "config.json"
        raise CheckpointError(f"{exc.message}\nGive {alone} to leave the weights aside.") from exc


def _published_tensors() -> list[ModelShape]:
    shapes = map(ModelShape.from_config, published_configs().values())
    return [_tensors(shape) for shape in shapes]


def _tensors(shape: ModelShape) -> ModelShape:
    """The shape without what no tensor depends on."""
    return replace(shape, rope_theta=0.0, rms_norm_eps=0.0, max_positions=0, yarn=None)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            raise CheckpointError(
                f"{file} is no config.json: it has more than {_MAX_CONFIG_BYTES:,} bytes"
            )
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise CheckpointError(f"{file} cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise CheckpointError(f"{file} is no config.json, for it is not JSON: {exc}") from exc
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return config


def _unknown(text: str) -> str:
    presets = preset_names("models")
    names = {name.lower(): name for name in (*presets, *published_configs())}
    close = difflib.get_close_matches(text.lower(), names, n=1)
    guess = f", did you mean {names[close[0]]!r}?" if close else "."
    return (
        f"no model {text!r}{guess} A model is a preset ({', '.join(presets)}), a folder or a"
        " config.json, or a published repository such as Qwen/Qwen2.5-Coder-7B-Instruct"
    )


def _short(repository: str) -> str:
    return repository.partition("/")[2].lower()
