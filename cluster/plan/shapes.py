"""What the published config.json files say, so that a model can be planned without its weights.

Not a checkpoint's own files (`serve.checkpoint`). The one decision: shapes are data
(`configs/shapes.yaml`), looked up by the repository that a preset names, so that each fact of the
family is written once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml

from serve.catalog import ModelShape

from .presets import configs_path, read_preset


@cache
def published_configs() -> Mapping[str, Mapping[str, Any]]:
    """By repository, as `Qwen/Qwen2.5-7B-Instruct`: what its config.json says."""
    table = yaml.safe_load((configs_path() / "shapes.yaml").read_text(encoding="utf-8"))
    return {
        entry["name"].format(size=size): {**table["sizes"][size], **entry.get("config", {})}
        for entry in table["repositories"]
        for size in entry["sizes"]
    }


def published_shape(repository: str) -> ModelShape | None:
    """Shape of a published repository, in any case and with or without its owner; or None."""
    wanted = repository.lower()
    for name, config in published_configs().items():
        if wanted in (name.lower(), name.partition("/")[2].lower()):
            return ModelShape.from_config(config)
    return None


def preset_shape(name: str) -> ModelShape | None:
    """Shape of the model that a preset of configs/models names; None if it is not published."""
    preset = read_preset("models", name)
    repository = preset.values.get("repository") if preset else None
    return published_shape(repository) if isinstance(repository, str) else None
