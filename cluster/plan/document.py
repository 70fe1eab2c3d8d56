"""YAML with a place for every value, so that a wrong one can be named as `file:line`.

Not validation. The one decision: values are plain Python (dict, list, scalars) and their places a
table beside them, keyed by the path of keys, so that pydantic can check the values as they are and
its paths find their lines here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written: a line of a file, or an option of the command line."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a configuration cannot be used."""

    place: Place
    key: str
    message: str

    def __str__(self) -> str:
        return (
            f"{self.place}: {self.key}: {self.message}"
            if self.key
            else (f"{self.place}: {self.message}")
        )


@dataclass(slots=True)
class Document:
    """Values with their places; `problems` are what made reading them incomplete."""

    values: dict[str, Any]
    places: dict[KeyPath, Place]
    root: Place
    problems: list[Problem] = field(default_factory=list)

    def place_of(self, path: KeyPath) -> Place:
        """The place of `path`, or of what holds it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return self.root

    def known_part(self, path: KeyPath) -> KeyPath:
        """The longest part of `path` that was written."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return path[:length]
        return ()

    def put(self, path: KeyPath, value: Any, *, place: Place) -> None:
        """Write `value` at `path`, over what is there, making mappings on the way."""
        self.forget(path)
        holder: Any = self.values
        for depth, key in enumerate(path[:-1], start=1):
            if isinstance(holder, dict) and not isinstance(holder.get(key), dict | list):
                holder[key] = {}
                self.places[path[:depth]] = place
            holder = holder[key]
        holder[path[-1]] = value
        for inner in _paths_of(value, path):
            self.places[inner] = place

    def forget(self, path: KeyPath) -> None:
        """Drop the places of `path` and of all below it."""
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]

    def merge_below(self, path: KeyPath, other: Document) -> None:
        """Fill the mapping at `path` with what only `other` has, however deep."""
        holder: Any = self.values
        for key in path:
            holder = holder[key]
        self._fill(holder, other.values, path, (), other)

    def _fill(
        self, target: dict[str, Any], source: Any, path: KeyPath, below: KeyPath, other: Document
    ) -> None:
        for key, value in source.items():
            here, there = (*path, key), (*below, key)
            if key not in target:
                target[key] = value
                for inner in _paths_of(value, there):
                    self.places[path + inner[len(below) :]] = other.place_of(inner)
            elif isinstance(target[key], dict) and isinstance(value, dict):
                self._fill(target[key], value, here, there, other)


def read_document(path: Path) -> Document:
    """Read a YAML file; what is not YAML, or no mapping, is a problem of the document."""
    source = str(path)
    document = Document({}, {}, Place(source, 1))
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as exc:
        document.root = Place(source)
        document.problems.append(Problem(document.root, "", f"cannot be read: {_reason(exc)}"))
        return document
    except yaml.MarkedYAMLError as exc:
        line = exc.problem_mark.line + 1 if exc.problem_mark else 1
        document.problems.append(Problem(Place(source, line), "", f"not YAML: {exc.problem}"))
        return document
    except yaml.YAMLError as exc:
        document.problems.append(Problem(document.root, "", f"not YAML: {exc}"))
        return document
    if node is None:
        return document
    if not isinstance(node, yaml.MappingNode):
        document.problems.append(Problem(document.root, "", "must be a mapping of keys"))
        return document
    document.values = _Builder(document, source).build(node, ())
    return document


class _Builder:
    """Turns YAML's nodes into values, noting each one's line and every key written twice."""

    def __init__(self, document: Document, source: str) -> None:
        self._document = document
        self._source = source
        self._scalars = yaml.SafeLoader("")
        self._open: list[yaml.Node] = []

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self._document.places.setdefault(path, Place(self._source, node.start_mark.line + 1))
        if isinstance(node, yaml.ScalarNode):
            return self._build_scalar(node, path)
        if any(node is outer for outer in self._open):
            self._note(self._document.places[path], path, "contains itself")
            return None
        self._open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._build_mapping(node, path)
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        finally:
            self._open.pop()

    def _build_mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            place = Place(self._source, key_node.start_mark.line + 1)
            if key in values:
                first = self._document.places[(*path, key)].line
                self._note(place, (*path, key), f"is written twice, first in line {first}")
                continue
            self._document.places[(*path, key)] = place
            values[key] = self.build(value_node, (*path, key))
        return values

    def _build_scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        try:
            return self._scalars.construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError) as exc:
            place = Place(self._source, node.start_mark.line + 1)
            problem = getattr(exc, "problem", None) or exc
            self._note(place, path, f"not a value that YAML can hold safely: {problem}")
            return None

    def _note(self, place: Place, path: KeyPath, message: str) -> None:
        self._document.problems.append(Problem(place, render_path(path), message))


def render_path(path: KeyPath) -> str:
    """`("models", 0, "path")` as `models[0].path`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _paths_of(value: Any, path: KeyPath) -> list[KeyPath]:
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += _paths_of(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            found += _paths_of(inner, (*path, index))
    return found


def _reason(exc: OSError | UnicodeDecodeError) -> str:
    if isinstance(exc, UnicodeDecodeError):
        return f"byte {exc.start} is not UTF-8"
    return exc.strerror or str(exc)
