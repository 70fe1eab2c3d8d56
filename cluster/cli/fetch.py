"""Brings a model from a hub before a start, and shows it as the start's first phase.

Not the download (`cluster.download`) and not its command. The one decision: what is in the hub's
cache is used without a word to the hub, so that only a first start needs a network.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.download import Hub, HubCache, Watcher
from cluster.errors import UsageError
from cluster.local.progress import PhaseEvent

from .display import StartDisplay, make_display

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.local.interrupts import Interrupts
    from serve.catalog import ModelShape

_LEAST_BYTES_PER_VALUE = 2
_GB = 1e9


class ModelFetcher:
    """Fetches models for this machine, which holds weights of at most `max_bytes`."""

    def __init__(self, console: Console, interrupts: Interrupts, *, max_bytes: int | None) -> None:
        self._console = console
        self._interrupts = interrupts
        self._max_bytes = max_bytes

    def __call__(self, repository: str, revision: str) -> Path:
        """The folder of the model, fetched unless it is in the hub's cache.

        Raises:
            DownloadError: what is wrong with the hub, the repository or the volume.
            UsageError: the model is larger than this machine's memory.
            InterruptedStartError: a signal came.
        """
        hub, cache = Hub.from_environment(), HubCache.from_environment()
        found = cache.find(repository, revision, hub=hub)
        if found is not None:
            self._console.print(f"{repository} is in {found}", style="dim", markup=False)
            return found
        began = time.monotonic()
        with make_display(self._console) as display:
            display.on_event(PhaseEvent("begin", "download"))
            folder = cache.fetch(
                repository,
                revision=revision,
                hub=hub,
                watcher=_Shown(self._console, display, self._interrupts),
                on_shape=self._refuse_too_large,
            )
            seconds = time.monotonic() - began
            display.on_event(PhaseEvent("end", "download", seconds=seconds))
        return folder

    def _refuse_too_large(self, shape: ModelShape) -> None:
        """What is certain not to fit is not fetched; the planner sees to the rest."""
        num_bytes = shape.num_params * _LEAST_BYTES_PER_VALUE
        if self._max_bytes is not None and num_bytes > self._max_bytes:
            raise UsageError(
                f"the model does not fit in memory: its weights have {num_bytes / _GB:.1f} GB,"
                f" there is room for {self._max_bytes / _GB:.1f} GB",
                hint="Its weights were not fetched. `shoal plan` says which machine would do.",
            )


class _Shown(Watcher):
    """A download on the console; a signal ends it."""

    def __init__(self, console: Console, display: StartDisplay, interrupts: Interrupts) -> None:
        self._console = console
        self._display = display
        self._interrupts = interrupts

    def tell(self, line: str) -> None:
        self._console.print(line, style="dim", markup=False)

    def tell_rate(self, line: str) -> None:
        if not self._console.is_terminal:  # there, a bar says it
            self.tell(line)

    def on_progress(self, num_bytes: int, num_total_bytes: int) -> None:
        event = PhaseEvent(
            "progress", "download", num_bytes=num_bytes, num_total_bytes=num_total_bytes
        )
        self._display.on_event(event)

    def is_stopped(self) -> bool:
        return self._interrupts.num_received > 0
