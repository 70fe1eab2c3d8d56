"""Programs that end with whoever started them, even when that is killed.

The kernel sends SIGKILL to the child as its parent's thread ends (`setpriv --pdeathsig`), so a
killed test run leaves no server behind. Not for programs that start others.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_POLL_S = 0.1
_LOG_TAIL_CHARACTERS = 4000


class NotReadyError(Exception):
    """A program ended or did not answer in time; the message ends with its log."""


class Program:
    """One running program with its log in a file.

    Attributes:
        pid: its process.
    """

    def __init__(self, command: Sequence[str | Path], *, log: Path) -> None:
        self._name = Path(command[0]).name
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
            )
        self.pid = self._process.pid

    def wait_until(self, is_ready: Callable[[], bool], *, timeout_s: float) -> None:
        """Returns once `is_ready()`.

        Raises:
            NotReadyError: the program ended, or `timeout_s` passed.
        """
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            if (status := self._process.poll()) is not None:
                raise NotReadyError(f"{self._name} ended with {status}:\n{self._tail()}")
            if time.monotonic() > deadline:
                raise NotReadyError(f"{self._name} not ready in {timeout_s} s:\n{self._tail()}")
            time.sleep(_POLL_S)

    def end(self) -> None:
        """Ends it at once: its data is thrown away, so there is nothing to put in order."""
        self._process.kill()
        self._process.wait()

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-_LOG_TAIL_CHARACTERS:]
