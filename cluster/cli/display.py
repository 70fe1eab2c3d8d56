"""Shows a start as it goes on: a live table in a terminal, a line per phase elsewhere.

Not the phases themselves (`cluster.local.progress` tells them).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.text import Text

from cluster.local.progress import Phase, PhaseEvent

_TITLES: dict[Phase, str] = {
    "download": "Download",
    "ray": "Ray",
    "serve": "Serve",
    "weights": "Weights",
    "warm_up": "Warm-up",
    "ready": "Ready",
}


class StartDisplay(Protocol):
    """A context that listens to a start."""

    def __enter__(self) -> StartDisplay: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def on_event(self, event: PhaseEvent) -> None: ...


def make_display(console: Console) -> StartDisplay:
    """The display that fits where `console` writes to."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


class PlainDisplay:
    """One line for each phase that is over."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    def on_event(self, event: PhaseEvent) -> None:
        if event.kind == "end":
            self._console.print(
                f"{_TITLES[event.phase]:<8} {event.seconds:6.1f} s", highlight=False
            )


class LiveDisplay:
    """A row for each phase, with a bar while the weights are read."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text=Text("✓", style="green")),
            TextColumn("{task.description:<8}"),
            _BytesBar(bar_width=32),
            _SecondsColumn(),
            console=console,
        )
        self._tasks: dict[Phase, TaskID] = {}

    def __enter__(self) -> LiveDisplay:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def refresh(self) -> None:
        """Draw now, rather than at the next tenth of a second."""
        self._progress.refresh()

    def on_event(self, event: PhaseEvent) -> None:
        if event.phase not in self._tasks:
            self._tasks[event.phase] = self._progress.add_task(_TITLES[event.phase], total=None)
        task = self._tasks[event.phase]
        if event.kind == "progress":
            self._progress.update(task, completed=event.num_bytes, total=event.num_total_bytes)
        elif event.kind == "end":
            total = self._progress.tasks[task].total or 1
            self._progress.update(task, completed=total, total=total, seconds=event.seconds)


class _BytesBar(BarColumn):
    """A bar for the phase whose bytes are known, nothing for the others."""

    def render(self, task: Task) -> Text:  # type: ignore[override]
        if task.total is None or task.total <= 1:
            return Text("")
        filled = round(32 * task.completed / task.total)
        bar = "━" * filled + " " * (32 - filled)
        megabytes = f" {task.completed / 1e6:,.1f} of {task.total / 1e6:,.1f} MB"
        return Text.assemble((bar, "cyan"), megabytes)


class _SecondsColumn(ProgressColumn):
    """How long the phase took, or takes so far."""

    def render(self, task: Task) -> Text:
        seconds = task.fields.get("seconds", task.elapsed or 0.0)
        return Text(f"{seconds:5.1f} s", style="dim")


def address_lines(addresses: list[str]) -> list[str]:
    """Where the API and the page are, one address a line."""
    first, *others = addresses
    return [f"  API and page    {first}", *(f"                  {other}" for other in others)]


def duration(seconds: float) -> str:
    """The two largest units of a time."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    units = ((days, "d"), (hours, "h"), (minutes, "min"), (rest, "s"))
    first = next((index for index, (count, _) in enumerate(units) if count), len(units) - 1)
    return " ".join(f"{count} {unit}" for count, unit in units[first : first + 2])


def command_name() -> str:
    """How the user can call `shoal` from this folder: by name if it is on the path."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return f"{sys.executable} -m cluster"
    found = shutil.which("shoal")
    if found is not None and Path(found).resolve() == program.resolve():
        return "shoal"
    try:
        return str(program.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(program)
