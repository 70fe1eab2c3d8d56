"""From what a user wrote to a configuration that can be planned, or every reason why not.

Not "auto" and not the machine: that is `cluster.planner`. The one decision: presets are merged
into the plain values first, each keeping its own file and line, so that the schema and every check
see one document and all problems come out at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.config import ShoalConfig
from serve.errors import ConfigurationError

from .checks import check_values
from .document import Document, KeyPath, Place, Problem, read_document, render_path
from .presets import configs_path, preset_names, read_preset, unknown_preset
from .schema_problems import schema_problems

__all__ = [
    "DEMO_MODEL_PATH",
    "DEMO_PRESET",
    "Fetch",
    "Options",
    "configs_path",
    "load_config",
    "preset_names",
]

DEMO_PRESET = "demo"
DEMO_MODEL_PATH = Path(__file__).resolve().parents[2] / "serve" / "demo"
_NO_FILE = Place("the default configuration")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_DEFAULT_REVISION = "main"

Fetch = Callable[[str, str], Path]


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says over the file: None where it says nothing."""

    model: str | None = None
    revision: str | None = None
    host: str | None = None
    port: int | None = None
    allow_anonymous: bool | None = None
    replicas: int | None = None


def load_config(
    path: Path | None,
    *,
    options: Options = Options(),
    needs_weights: bool = True,
    fetch: Fetch | None = None,
) -> ShoalConfig:
    """The configuration of a file (None: the demo model), presets merged, options applied.

    Relative model folders and keys files are relative to the file that names them. Without
    `needs_weights` a preset whose shape is published may go without a folder: enough for a plan.
    With `fetch`, a model that names a repository and no folder gets the one that
    `fetch(repository, revision)` returns, once nothing else is wrong.

    Raises:
        ConfigurationError: every problem, a line each, as `file:line: key: message`.
    """
    document = Document({}, {}, _NO_FILE) if path is None else read_document(path)
    problems = document.problems
    if not problems or document.values:
        _place_keys_file(document, folder=path.parent if path else Path())
        _apply_options(document, options, has_file=path is not None)
        problems += _merge_hardware(document)
        problems += _merge_models(document, folder=path.parent if path else Path())
        problems += schema_problems(document)
        problems += check_values(
            document, needs_weights=needs_weights, is_fetched=fetch is not None
        )
        if fetch is not None and not problems:
            _fetch_models(document, fetch)
            problems += check_values(document)
    if problems:
        raise ConfigurationError("\n".join(_in_order(problems)))
    return ShoalConfig.model_validate(document.values)


def _apply_options(document: Document, options: Options, *, has_file: bool) -> None:
    model = options.model
    if model is None and not has_file:
        document.put(("models",), [{"preset": DEMO_PRESET}], place=_NO_FILE)
    elif model is not None:
        document.put(("models",), [_named_model(model)], place=Place("--model"))
    for key in ("host", "port", "allow_anonymous"):
        value = getattr(options, key)
        if value is not None:
            place = Place("--" + key.replace("_", "-"))
            document.put(("http", key), value, place=place)
    entries = document.values.get("models")
    for index in range(len(entries) if isinstance(entries, list) else 0):
        if options.revision is not None:
            document.put(("models", index, "revision"), options.revision, place=Place("--revision"))
        if options.replicas is not None:
            bounds = {"min": options.replicas, "max": options.replicas}
            document.put(("models", index, "replicas"), bounds, place=Place("--replicas"))


def _named_model(text: str) -> dict[str, str]:
    """What `--model` means: a preset, a folder, a repository; a path that is none is a folder."""
    folder = Path(text).expanduser()
    if text in preset_names("models"):
        return {"preset": text}
    if not folder.is_dir() and _REPOSITORY.fullmatch(text):
        return {"repository": text}
    if folder.is_dir() or "/" in text:
        return {"path": str(folder.resolve())}
    return {"preset": text}


def _place_keys_file(document: Document, *, folder: Path) -> None:
    """Make the path absolute, symbolic links as they are: Kubernetes swaps a Secret's link."""
    http = document.values.get("http")
    written = http.get("keys_file") if isinstance(http, dict) else None
    if isinstance(written, str):
        path = (folder / Path(written).expanduser()).absolute()
        _replace(document, ("http", "keys_file"), str(path))


def _merge_hardware(document: Document) -> list[Problem]:
    if "hardware" not in document.values:
        return []  # the planner chooses: GPUs where this machine has them
    chosen = document.values["hardware"]
    name = chosen.get("name", "cpu") if isinstance(chosen, dict) else chosen
    if not isinstance(name, str):
        return []
    preset = read_preset("hardware", name)
    if preset is None:
        path: KeyPath = ("hardware", "name") if isinstance(chosen, dict) else ("hardware",)
        message = unknown_preset("hardware", name)
        return [Problem(document.place_of(path), render_path(path), message)]
    if not isinstance(chosen, dict):
        place = document.place_of(("hardware",))
        document.put(("hardware",), {"name": name}, place=place)
    document.merge_below(("hardware",), preset)
    return preset.problems


def _merge_models(document: Document, *, folder: Path) -> list[Problem]:
    entries = document.values.get("models")
    problems: list[Problem] = []
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        if isinstance(entry, dict):
            problems += _merge_model(document, ("models", index), entry, folder=folder)
    return problems


def _merge_model(
    document: Document, path: KeyPath, entry: dict[str, Any], *, folder: Path
) -> list[Problem]:
    problems: list[Problem] = []
    written = entry.get("path")
    if isinstance(written, str):
        _replace(document, (*path, "path"), str((folder / Path(written).expanduser()).resolve()))
    name = entry.get("preset")
    if isinstance(name, str):
        preset = read_preset("models", name)
        if preset is None:
            place = document.place_of((*path, "preset"))
            message = unknown_preset("models", name)
            return [Problem(place, render_path((*path, "preset")), message)]
        document.merge_below(path, preset)
        problems += preset.problems
        if name == DEMO_PRESET and "path" not in entry:
            place = document.place_of((*path, "preset"))
            document.put((*path, "path"), str(DEMO_MODEL_PATH), place=place)
    for key in ("path", "repository"):
        if "name" not in entry and isinstance(entry.get(key), str):
            place = document.place_of((*path, key))
            document.put((*path, "name"), Path(entry[key]).name.lower(), place=place)
    return problems


def _fetch_models(document: Document, fetch: Fetch) -> None:
    for index, entry in enumerate(document.values["models"]):
        if "repository" in entry and entry.get("path") is None and entry.get("stand_in") is None:
            folder = fetch(entry["repository"], entry.get("revision") or _DEFAULT_REVISION)
            place = document.place_of(("models", index, "repository"))
            document.put(("models", index, "path"), str(folder), place=place)


def _replace(document: Document, path: KeyPath, value: Any) -> None:
    document.put(path, value, place=document.place_of(path))


def _in_order(problems: list[Problem]) -> list[str]:
    ordered = sorted(problems, key=lambda problem: (problem.place.source, problem.place.line or 0))
    return list(dict.fromkeys(str(problem) for problem in ordered))
