"""How a start goes on: phases with times, told to whoever shows them.

Not a display (`cluster.cli` has two) and not a log. The one decision: the supervisor tells events,
so the same start can be shown in its own terminal, or by the command that waits for a detached one.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Phase = Literal["download", "ray", "serve", "weights", "warm_up", "ready"]


@dataclass(frozen=True, slots=True)
class PhaseEvent:
    """`seconds` is the phase's length once it is done; the bytes are of weights read so far."""

    kind: Literal["begin", "progress", "end", "failed"]
    phase: Phase
    seconds: float = 0.0
    num_bytes: int = 0
    num_total_bytes: int = 0
    message: str = ""
    hint: str = ""


class StartListener(Protocol):
    """Whoever shows a start."""

    def on_event(self, event: PhaseEvent) -> None: ...


class EventPipe:
    """A listener that writes events as JSON lines to a file descriptor, for another process.

    Nobody needs to read: once the reader is gone, events are dropped.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def on_event(self, event: PhaseEvent) -> None:
        with contextlib.suppress(OSError):
            os.write(self._descriptor, (json.dumps(asdict(event)) + "\n").encode())


def parse_event(line: str) -> PhaseEvent:
    """One line of an `EventPipe`."""
    return PhaseEvent(**json.loads(line))


def kernels_of(folder: Path, application: str) -> list[str]:
    """Kernels that an application's ready replicas said they compute with, each once."""
    found: set[str] = set()
    for path in folder.glob("*.json"):
        if path.stem.rpartition("-")[0] == application:  # what is behind names the replica
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found.update(map(str, json.loads(path.read_text(encoding="utf-8"))["kernels"]))
    return sorted(found)


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """The sum over every replica's file in the progress folder."""

    num_files: int = 0
    num_bytes: int = 0
    num_total_bytes: int = 0
    is_warming_up: bool = False
    error: str = ""

    @classmethod
    def read(cls, folder: Path) -> LoadProgress:
        """Add up `<model>-<replica>.json` files; one that cannot be read is left out."""
        reports: list[dict[str, Any]] = []
        for path in sorted(folder.glob("*.json")):
            with contextlib.suppress(OSError, ValueError):
                reports.append(json.loads(path.read_text(encoding="utf-8")))
        return cls(
            num_files=len(reports),
            num_bytes=sum(int(report.get("num_bytes", 0)) for report in reports),
            num_total_bytes=sum(int(report.get("num_total_bytes", 0)) for report in reports),
            is_warming_up=bool(reports)
            and all(report.get("ready") or report.get("phase") == "warm_up" for report in reports),
            error=next((str(report["error"]) for report in reports if report.get("error")), ""),
        )
