"""A CRD as a JSON schema that refuses what a real server would prune or refuse.

Servers default before they validate, so `required` loses what has a default; and they drop unknown
fields in silence, so every object is closed that does not ask to stay open.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator

Schema = dict[str, Any]
_OPEN = "x-kubernetes-preserve-unknown-fields"
_KEPT = (
    *("type", "enum", "format", "pattern", "minimum", "maximum", "minLength", "maxLength"),
    *("minItems", "maxItems", "minProperties", "maxProperties", "nullable"),
)


@cache
def validators(folder: Path) -> dict[tuple[str, str], Draft7Validator]:
    """Validators by (apiVersion, kind)."""
    return {key: Draft7Validator(schema) for key, schema in strict_schemas(folder).items()}


@cache
def strict_schemas(folder: Path) -> dict[tuple[str, str], Schema]:
    """The stored version of every CRD in the folder, closed, by (apiVersion, kind)."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        spec = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["spec"]
        (version,) = [version for version in spec["versions"] if version["storage"]]
        key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
        schema = closed(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        found[key] = schema
    return found


def closed(schema: Schema) -> Schema:
    """`schema` in draft 7, closed and with Kubernetes' own rules applied."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result = {key: schema[key] for key in _KEPT if key in schema}
    if result.pop("nullable", False):
        result["type"] = [schema["type"], "null"]
    properties = schema.get("properties", {})
    if properties:
        result["properties"] = {key: closed(value) for key, value in properties.items()}
    if "items" in schema:
        result["items"] = closed(schema["items"])
    more = schema.get("additionalProperties")
    if isinstance(more, dict):
        result["additionalProperties"] = closed(more)
    elif schema.get("type") == "object" and more is None:
        result["additionalProperties"] = bool(schema.get(_OPEN))
    needed = [key for key in schema.get("required", []) if "default" not in properties[key]]
    if needed:
        result["required"] = needed
    for combined in ("allOf", "anyOf", "oneOf"):
        if combined in schema:
            result[combined] = schema[combined]
    return result
