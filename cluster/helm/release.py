"""Releases in Helm's words, and the questions that an engine answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

import yaml

Values = dict[str, Any]
Manifest = dict[str, Any]
_SEPARATOR = re.compile(r"^---[ \t]*$", re.MULTILINE)
_COMMENTS = re.compile(r"(?:^[ \t]*(?:#.*)?\n)+", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Revision:
    """One line of a release's history."""

    number: int
    status: str
    description: str


@dataclass(frozen=True, slots=True)
class Release:
    """One revision of a release: the user's values and what they rendered, hooks left out."""

    revision: int
    values: Values
    manifest: str


class HelmEngine(Protocol):
    """The six questions; every one raises `CommandError` with a plain message."""

    def render(self, values: Values, *, name: str, namespace: str) -> str:
        """The chart as YAML documents, tests left out, without a cluster."""
        ...

    def deploy(self, values: Values, *, name: str, is_upgrade: bool, is_dry_run: bool) -> str:
        """Install or upgrade, or only ask the server whether it would take it; the manifest."""
        ...

    def rollback(self, name: str, revision: int) -> None:
        """Make a new revision that is a copy of `revision`."""
        ...

    def uninstall(self, name: str) -> None:
        """Remove the release and its history."""
        ...

    def history(self, name: str) -> list[Revision]:
        """Every revision, oldest first; empty if there is no such release."""
        ...

    def release(self, name: str, revision: int | None = None) -> Release:
        """One revision (None: the newest)."""
        ...


def normalise(manifest: str) -> str:
    """The documents of a rendering, one separator between them, empty ones left out.

    Helm 3 and 4 differ in blank lines only; this is what makes them equal.
    """
    parts = [part.strip("\n") for part in _SEPARATOR.split(manifest)]
    return "".join(f"---\n{part}\n" for part in parts if _COMMENTS.sub("", part + "\n").strip())


def documents(manifest: str) -> list[Manifest]:
    """The objects of a rendering."""
    return [found for found in yaml.load_all(manifest, Loader=yaml.CSafeLoader) if found]
