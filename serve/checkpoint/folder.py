"""A model's folder: which of its files may be opened, and its JSON.

Not aware of models. The one decision behind it: everything in the folder is untrusted. A name is a
file of this folder or it is refused, sizes are bounded before anything is read, and what a name or
a number is shown as cannot break a terminal or a log.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from serve.errors import CheckpointError

_MAX_PROBLEMS = 20
_MAX_SHOWN = 200


class ModelFolder:
    """The folder at `path`; what is wrong with it gathers in `problems`."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path).resolve()
        self.problems: list[str] = []
        self._given_path = path

    def check(self) -> None:
        """Raise what is wrong, if anything is.

        Raises:
            CheckpointError: every problem so far.
        """
        if self.problems:
            raise self.refusal()

    def refusal(self) -> CheckpointError:
        """Every problem so far in one error."""
        problems = self.problems[:_MAX_PROBLEMS]
        if len(self.problems) > _MAX_PROBLEMS:
            problems.append(f"and {len(self.problems) - _MAX_PROBLEMS} more")
        separator = "\n  " if len(self.problems) > 1 else " "
        return CheckpointError(separator.join([f"model folder {self._given_path}:", *problems]))

    def has(self, name: str) -> bool:
        """Whether something has this name, be it a broken link."""
        return os.path.lexists(self.path / name)

    def file(self, name: str) -> Path | None:
        """Where the regular file `name` really lies; None, and a problem, where it must not."""
        if name != os.path.basename(name) or name in {"", ".", ".."} or "\0" in name:
            self.problems.append(f"file name {shown(repr(name))} leaves the model folder")
            return None
        path = self.path / name
        try:
            if not os.path.lexists(path):
                self.problems.append(f"{shown(name)} is missing")
                return None
            resolved = path.resolve()
            is_inside = _may_lead_to(self.path, resolved)
            if not is_inside:
                self.problems.append(
                    f"{shown(name)} is a link that leaves the model folder (to {resolved})"
                )
            elif not resolved.is_file():
                self.problems.append(f"{shown(name)} is not a regular file")
                is_inside = False
        except (
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # too long, no Unicode, a ring of links
            self.problems.append(f"{shown(name)} cannot be opened: {error}")
            return None
        return resolved if is_inside else None

    def read_bytes(self, name: str, *, max_bytes: int) -> bytes | None:
        """All of file `name`; None, and a problem, where it cannot be read or is longer."""
        path = self.file(name)
        if path is None:
            return None
        try:
            with path.open("rb") as file:
                content = file.read(max_bytes + 1)
        except OSError as error:
            self.problems.append(f"{name} cannot be read: {error.strerror}")
            return None
        if len(content) > max_bytes:
            self.problems.append(f"{name} must be <= {max_bytes} bytes")
            return None
        return content

    def read_json(self, name: str, *, max_bytes: int) -> dict[str, Any] | None:
        """The JSON object in file `name`; None, and a problem, where it has none."""
        text = self.read_bytes(name, max_bytes=max_bytes)
        if text is None:
            return None
        parsed = parse_object(text)
        if parsed is None:
            self.problems.append(f"{name} is not a JSON object")
        return parsed


def _may_lead_to(folder: Path, target: Path) -> bool:
    """Whether a link in the model folder may lead to `target`; both are resolved.

    To another file of the folder. In a hub's cache (`models--org--name/snapshots/COMMIT`) every
    file is a link to `models--org--name/blobs`, so there, and only there, to a file of that too.
    """
    repository = folder.parent.parent
    is_snapshot = folder.parent.name == "snapshots" and repository.name.startswith("models--")
    return target.is_relative_to(folder) or (
        is_snapshot and target.is_relative_to(repository / "blobs")
    )


class RepeatedKeyError(ValueError):
    """A JSON object has a key twice, which parsers read differently."""


def parse_object(text: bytes, *, are_keys_unique: bool = False) -> dict[str, Any] | None:
    """The JSON object that `text` is, or None.

    Raises:
        RepeatedKeyError: some object has a key twice and `are_keys_unique`; names it.
    """
    try:
        parsed = json.loads(text, object_pairs_hook=_unique if are_keys_unique else None)
    except RepeatedKeyError:
        raise
    except (ValueError, RecursionError):  # ValueError covers bad JSON, bad UTF-8 and huge integers
        return None
    return parsed if isinstance(parsed, dict) else None


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise RepeatedKeyError(key)
        found[key] = value
    return found


def shown(name: str) -> str:
    """A name as messages show it: short, and nothing that is not printable."""
    text = name if name.isprintable() else ascii(name)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
