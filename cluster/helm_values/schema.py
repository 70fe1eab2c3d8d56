"""The JSON schema of the values, which Helm checks before it renders anything.

Not a schema by hand. Two things are added to what pydantic gives: presets are the names of files,
and overrides are the configuration's own sections with every key optional.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from cluster.plan import preset_names
from serve.config import HardwareConfig, ModelConfig

from .chart import ChartValues
from .values import LATE_AUTO, NOT_HARDWARE_OVERRIDES, NOT_MODEL_OVERRIDES

Schema = dict[str, Any]
_DROPPED = ("title", "default")


def values_schema() -> Schema:
    """`values.schema.json`, of draft 7, which every Helm 3 and 4 reads."""
    schema = ChartValues.model_json_schema(by_alias=True)
    sections: Schema = schema["$defs"]
    for name in ("ModelValues", "ServedModelValues"):
        properties = sections[name]["properties"]
        properties["preset"]["enum"] = preset_names("models")
        _set_overrides(sections, properties, ModelConfig, NOT_MODEL_OVERRIDES)
    properties = sections["HardwareValues"]["properties"]
    properties["preset"]["enum"] = preset_names("hardware")
    _set_overrides(sections, properties, HardwareConfig, NOT_HARDWARE_OVERRIDES)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart shoal",
        **_without_noise(schema),
    }


def _set_overrides(
    sections: Schema, properties: Schema, section: type[BaseModel], refused: frozenset[str]
) -> None:
    partial = section.model_json_schema()
    for inner, definition in partial.pop("$defs", {}).items():
        sections[inner] = _all_optional(definition)
    name = f"{section.__name__.removesuffix('Config')}Overrides"
    sections[name] = _all_optional(partial, refused)
    properties["overrides"] = {
        "$ref": f"#/$defs/{name}",
        "description": properties["overrides"]["description"],
    }


def _all_optional(schema: Schema, refused: frozenset[str] = frozenset()) -> Schema:
    properties = {
        key: value if key in LATE_AUTO else _without_auto(value)
        for key, value in schema["properties"].items()
        if key not in refused
    }
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _without_auto(schema: Schema) -> Schema:
    choices = [choice for choice in schema.get("anyOf", []) if choice.get("const") != "auto"]
    if not choices:
        return schema
    rest = {key: value for key, value in schema.items() if key != "anyOf"}
    return {**rest, **choices[0]} if len(choices) == 1 else {**rest, "anyOf": choices}


def _without_noise(schema: Any) -> Any:
    """Without titles, which repeat the keys, and defaults, which `values.yaml` has."""
    if isinstance(schema, list):
        return [_without_noise(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = _plain_null(schema)
    if schema.get("type") == "object" and "properties" in schema:
        kept = {key: value for key, value in schema.items() if key not in _DROPPED}
        inner = {key: _without_noise(value) for key, value in kept.pop("properties").items()}
        return {**_without_noise_of_rest(kept), "properties": inner}
    return _without_noise_of_rest(schema)


def _without_noise_of_rest(schema: Schema) -> Schema:
    return {key: _without_noise(value) for key, value in schema.items() if key not in _DROPPED}


def _plain_null(schema: Schema) -> Schema:
    """`X or null` as one type, so that a refusal is one line."""
    choices = schema.get("anyOf", [])
    if len(choices) != 2 or choices[1] != {"type": "null"} or "type" not in choices[0]:
        return schema
    rest = {key: value for key, value in schema.items() if key != "anyOf"} | choices[0]
    if "enum" in rest:
        rest["enum"] = [*rest["enum"], None]
    return {**rest, "type": [rest["type"], "null"]}
