"""The file that makes a folder of weights complete: what they are, and every file with its size."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Set
from dataclasses import asdict, dataclass
from pathlib import Path

_NAME = ".shoal-weights.json"


@dataclass(frozen=True, slots=True)
class Marker:
    """`revision` as it was asked for, `commit` what it meant; `files`: name -> size in bytes."""

    repository: str
    revision: str
    commit: str
    files: dict[str, int]

    @classmethod
    def read(cls, folder: Path) -> Marker | None:
        """The folder's marker; None where there is none that can be read."""
        try:
            fields = json.loads((folder / _NAME).read_text(encoding="utf-8"))
            marker = cls(**fields)
            is_sound = all(isinstance(size, int) for size in marker.files.values())
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            return None
        return marker if is_sound else None

    def is_of(self, repository: str, revision: str) -> bool:
        """Whether these are the weights that somebody asks for."""
        return self.repository == repository and revision in (self.revision, self.commit)

    def missing(self, folder: Path) -> list[str]:
        """Names of files that are not there in full."""
        return [name for name, size in self.files.items() if file_size(folder / name) != size]

    def write(self, folder: Path) -> None:
        """Put it into `folder`, by one rename, once everything is on the disk."""
        draft = folder / f"{_NAME}.new"
        with draft.open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(folder / _NAME)

    def remove(self, folder: Path, *, keep: Set[str]) -> None:
        """Take the marker away, then its files but those named in `keep`."""
        (folder / _NAME).unlink(missing_ok=True)
        for name in self.files.keys() - keep:
            if Path(name).name == name:
                with contextlib.suppress(FileNotFoundError):
                    (folder / name).unlink()


def file_size(path: Path) -> int:
    """Bytes of a file; -1 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
