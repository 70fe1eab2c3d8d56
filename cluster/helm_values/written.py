"""From a configuration as a user wrote it to the chart's values: what `shoal deploy CONFIG` needs.

Not a merge with presets, which the chart does by itself. The one decision: a key that a cluster has
no use for is refused by its name, never dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from serve.errors import ConfigurationError

from .values import NOT_HARDWARE_OVERRIDES

Written = Mapping[str, Any]
ValuesDict = dict[str, Any]

_DIRECT = {"ingress_copies": "ingressCopies", "log_level": "logLevel"}
_DECIDED_BY_CHART = {
    "host": "pods listen on every address; who may reach them is expose and security.allowFrom",
    "keys_file": "on a cluster keys are in a Secret: auth.apiKeys.existingSecret",
}


def from_config(document: Written) -> ValuesDict:
    """Values of the chart for a configuration file's mapping, presets not merged.

    Raises:
        ConfigurationError: every key that a cluster cannot use, a line each, as `key: message`.
    """
    problems: list[str] = []
    values: ValuesDict = {}
    for key, value in document.items():
        if key in _DIRECT:
            if value != "auto":
                values[_DIRECT[key]] = value
        elif key in _SECTIONS:
            _SECTIONS[key](value, values, problems)
        else:
            problems.append(f"{key}: unknown key")
    if problems:
        raise ConfigurationError("\n".join(problems))
    return values


def _http(written: Written, values: ValuesDict, problems: list[str]) -> None:
    for key, value in written.items():
        if key == "port":
            values["service"] = {"port": value}
        elif key == "max_body_bytes":
            values["maxBodyBytes"] = value
        elif key == "page":
            values["web"] = {"enabled": value}
        elif key == "allow_anonymous":
            values["auth"] = {"allowAnonymous": value}
        else:
            problems.append(f"http.{key}: {_DECIDED_BY_CHART.get(key, 'unknown on a cluster')}")


def _hardware(written: str | Written, values: ValuesDict, problems: list[str]) -> None:
    if isinstance(written, str):
        values["hardware"] = {"preset": written}
        return
    values["hardware"] = {"preset": written.get("name", "cpu")}
    overrides = {}
    for key, value in written.items():
        if key == "upgrade":
            values["upgrade"] = {"type": value}
        elif key in NOT_HARDWARE_OVERRIDES - {"name"}:
            problems.append(f"hardware.{key}: is the preset's; name another preset")
        elif key != "name" and value != "auto":
            overrides[key] = value
    if overrides:
        values["hardware"]["overrides"] = overrides


def _models(written: list[Written], values: ValuesDict, problems: list[str]) -> None:
    entries = [_model(entry, f"models[{index}]", problems) for index, entry in enumerate(written)]
    if len(entries) > 1:
        values["models"] = entries
        return
    for entry in entries:
        values.update({key: entry[key] for key in ("tensorParallel", "replicas") if key in entry})
        values["model"] = {key: entry[key] for key in ("preset", "overrides") if key in entry}


def _model(written: Written, place: str, problems: list[str]) -> ValuesDict:
    entry: ValuesDict = {}
    overrides: ValuesDict = {}
    if "preset" not in written:
        problems.append(f"{place}.preset: is needed on a cluster, which looks up what fits by it")
    for key, value in written.items():
        if key == "preset":
            entry["preset"] = value
        elif key in ("path", "stand_in"):
            problems.append(f"{place}.{key}: is of this machine; a cluster has weights.from")
        elif value == "auto":
            continue
        elif key == "tensor_parallel":
            entry["tensorParallel"] = value
        elif key == "replicas":
            entry["replicas"] = {_REPLICAS.get(name, name): part for name, part in value.items()}
        else:
            overrides[key] = value
    if overrides:
        entry["overrides"] = overrides
    return entry


_REPLICAS = {"target_open_requests": "targetOngoing"}
_SECTIONS: dict[str, Callable[[Any, ValuesDict, list[str]], None]] = {
    "http": _http,
    "hardware": _hardware,
    "models": _models,
}
