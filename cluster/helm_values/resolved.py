"""From the chart's values to the one configuration: presets, fits and overrides merged.

Not a plan: what fits is looked up in `configs/fits.yaml`, as the chart does. The one decision: this
is the Python twin of the templates `_plan.tpl` and `_serve.tpl`; a test compares what the two make
of every combination, refusals included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from cluster.plan import configs_path
from serve.config import HardwareConfig, HttpConfig, ModelConfig, ReplicasConfig, ShoalConfig
from serve.errors import ConfigurationError

from .chart import ChartValues
from .values import ServedModelValues

SERVE_PORT = 8000
KEYS_FOLDER = "/etc/shoal/keys"
WEIGHTS_FOLDER = "/models"
BAKED_FOLDER = "/opt/shoal/models"
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")

Merged = dict[str, Any]


def to_config(values: ChartValues) -> ShoalConfig:
    """The resolved configuration that the release of these values serves.

    Raises:
        ConfigurationError: a preset is unknown, a size cannot be used, or nobody may ask.
    """
    served = served_models(values)
    models, hardware = _effective_models(values, served)
    return ShoalConfig(
        http=HttpConfig.model_validate(_http(values)),
        hardware=HardwareConfig.model_validate(hardware),
        models=tuple(ModelConfig.model_validate(model) for model in models),
        ingress_copies=values.ingress_copies,
        log_level=values.log_level,
    )


def served_models(values: ChartValues) -> tuple[ServedModelValues, ...]:
    """`models`, or the one model that the short form describes."""
    if values.models:
        return values.models
    return (
        ServedModelValues(
            preset=values.model.preset,
            overrides=values.model.overrides,
            tensor_parallel=values.tensor_parallel,
            replicas=values.replicas,
        ),
    )


def weights_source(values: ChartValues) -> str:
    """Where the weights are: `weights.from`, or what its null stands for."""
    presets = {model.preset for model in served_models(values)}
    return values.weights.from_ or ("baked" if presets == {"demo"} else "pvc")


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> Merged:
    """A deep merge; `above` wins, lists are replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _effective_models(
    values: ChartValues, served: tuple[ServedModelValues, ...]
) -> tuple[list[Merged], Merged]:
    source = weights_source(values)
    models: list[Merged] = []
    hardwares: list[Merged] = []
    for index, entry in enumerate(served):
        key = f"models[{index}]." if values.models else ""
        size, fit = _fitting_size(entry, values.hardware.preset, key)
        if hardwares and size != models[0]["tensor_parallel"]:
            raise ConfigurationError(
                f"{key}tensorParallel: must be {models[0]['tensor_parallel']}, the size of the"
                f" first model, got {size}"
            )
        preset = _preset("models", entry.preset)
        model = merge(merge(preset, fit["model"]), entry.overrides)
        if not _NAME.match(model["name"]):
            raise ConfigurationError(
                f"{key or 'model.'}overrides.name: must be letters, digits and ._-/,"
                f" got {model['name']!r}"
            )
        model["path"] = _weights_path(source, preset=entry.preset, name=model["name"])
        model["replicas"] = ReplicasConfig(
            min=entry.replicas.min,
            max=entry.replicas.max,
            target_open_requests=entry.replicas.target_ongoing,
        )
        models.append(model)
        hardware = merge(_preset("hardware", values.hardware.preset), fit["hardware"])
        if hardwares:
            _check_memory(hardware["pod"]["memory"], hardwares[0]["pod"]["memory"], key)
        hardwares.append(merge(hardware, values.hardware.overrides))
    return models, hardwares[0]


def _fitting_size(entry: ServedModelValues, hardware: str, key: str) -> tuple[int, Merged]:
    fits = _fits(configs_path() / "fits.yaml")
    if entry.preset not in fits:
        raise ConfigurationError(f"{key or 'model.'}preset: no preset named {entry.preset!r}")
    if hardware not in fits[entry.preset]:
        raise ConfigurationError(f"hardware.preset: no preset named {hardware!r}")
    found = fits[entry.preset][hardware]
    sizes: Merged = found["sizes"]
    where = f"{entry.preset} on {hardware}"
    if not sizes:
        raise ConfigurationError(f"{key or 'model.'}preset: {where}: {found['refused']}")
    size = str(entry.tensor_parallel or found["chosen"])
    if size not in sizes:
        reason = (found.get("unfit") or {}).get(size, "it does not divide the model's heads")
        raise ConfigurationError(
            f"{key}tensorParallel: {size} cannot be used for {where}: {reason};"
            f" sizes that fit: {', '.join(sorted(sizes, key=int))}"
        )
    return int(size), sizes[size]


def _check_memory(needed: str, given: str, key: str) -> None:
    """The first model sizes the pods: another one must not need more."""
    if given.endswith("Gi") and int(needed.removesuffix("Gi")) > int(given.removesuffix("Gi")):
        raise ConfigurationError(
            f"{key}preset: needs pods of {needed}, those of the first model have {given}: put it"
            " first, or set hardware.overrides.pod.memory"
        )


def _weights_path(source: str, *, preset: str, name: str) -> str:
    return f"{BAKED_FOLDER}/{preset}" if source == "baked" else f"{WEIGHTS_FOLDER}/{name}"


def _http(values: ChartValues) -> Merged:
    auth = values.auth
    http: Merged = {"host": "0.0.0.0", "port": SERVE_PORT}
    if auth.api_keys.existing_secret and auth.allow_anonymous:
        raise ConfigurationError(
            "auth.allowAnonymous: must be false where auth.apiKeys.existingSecret is set"
        )
    if auth.api_keys.existing_secret:
        http["keys_file"] = f"{KEYS_FOLDER}/{auth.api_keys.key}"
    elif auth.allow_anonymous:
        http["allow_anonymous"] = True
    else:
        raise ConfigurationError(
            "auth.apiKeys.existingSecret: is needed, the API would be open to everyone: name a"
            " Secret made by `shoal keys create NAME --secret SECRET`, or set auth.allowAnonymous"
        )
    if not values.web.enabled:
        http["page"] = False
    if values.max_body_bytes is not None:
        http["max_body_bytes"] = values.max_body_bytes
    return http


def _preset(kind: str, name: str) -> Merged:
    return dict(_read(configs_path() / kind / f"{name}.yaml"))


def _fits(path: Path) -> Merged:
    return _read(path)


@cache
def _read(path: Path) -> Merged:
    document: Merged = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    return document
