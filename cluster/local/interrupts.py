"""Ctrl-C and its relatives as something to wait on, instead of an exception anywhere.

Counts SIGINT, SIGTERM and SIGHUP: the first asks for an orderly end, the second skips the draining.
The handler writes into a pipe that waiting selects on, so a wait costs nothing and ends at once.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """A context in which the signals are counted; the former handlers return at its end."""

    def __init__(self) -> None:
        self.num_received = 0
        self._former: dict[signal.Signals, object] = {}
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._former[number] = signal.signal(number, self._count)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        os.close(self._reader)
        os.close(self._writer)

    def wait(self, timeout_s: float, *, num_wanted: int = 1) -> bool:
        """Sleep for `timeout_s` or until `num_wanted` signals came; whether they have."""
        ends = time.monotonic() + timeout_s
        while self.num_received < num_wanted:
            left = ends - time.monotonic()
            if left <= 0:
                return False
            if select.select([self._reader], [], [], left)[0]:
                os.read(self._reader, 4096)
        return True

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.num_received += 1
        os.write(self._writer, b"!")
