"""An engine as a process of its own: asked, then frozen until its next turn.

Not the engines (`scripts.bench.peers`). The one decision: whoever is not asked is stopped by a
signal, so that threads which spin between orders take nothing from the one that is measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from scripts.bench.peers.protocol import Facts, Run

START_TIMEOUT_S = 600.0
ANSWER_TIMEOUT_S = 900.0
_END_TIMEOUT_S = 10.0
_TAIL_CHARS = 600


class ContenderError(Exception):
    """The process ended, or was silent for too long."""


@dataclass(frozen=True, slots=True)
class ContenderSpec:
    """How an engine is started; `key` names it in options and results."""

    key: str
    python: Path
    module: str
    arguments: tuple[str, ...]
    is_ours: bool = False


class Contender:
    """A running engine; frozen but while it loads or answers.

    Raises:
        ContenderError: it did not start.
    """

    def __init__(self, spec: ContenderSpec, log_path: Path) -> None:
        self.spec = spec
        self._log_path = log_path
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [str(spec.python), "-m", spec.module, *spec.arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self._unread = b""
        try:
            self.facts = Facts(**self._read(START_TIMEOUT_S))
        except ContenderError:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    @property
    def pid(self) -> int:
        """Of its first process, which leads the group."""
        return self._process.pid

    def ask(self, prompts: list[list[int]], num_tokens: int) -> tuple[Run, float]:
        """One order; returns what it measured, and the CPU seconds of all its processes.

        Raises:
            ContenderError: it ended or hangs; it is closed, so that it takes nothing from others.
        """
        self._signal(signal.SIGCONT)
        began_s = self._cpu_seconds()
        order = json.dumps({"prompts": prompts, "num_tokens": num_tokens})
        try:
            run = self._answer(order)
        except ContenderError:
            self.close()
            raise
        cpu_s = self._cpu_seconds() - began_s
        self._signal(signal.SIGSTOP)
        return run, cpu_s

    def memory_bytes(self) -> int:
        """Proportional set size of all its processes."""
        return sum(process.memory_full_info().pss for process in self._processes())

    def close(self) -> None:
        """End it, with every process that it started."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_TIMEOUT_S)
        self._signal(signal.SIGKILL)  # its group may have outlived it
        self._process.wait()
        self._process.stdout.close()

    def _answer(self, order: str) -> Run:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(order.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as exc:
            raise ContenderError(self._tail()) from exc
        return Run(**self._read(ANSWER_TIMEOUT_S))

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            left_s = max(0.0, deadline - time.monotonic())
            if not select.select([descriptor], [], [], left_s)[0]:
                raise ContenderError(f"silent for {timeout_s:g} s: {self._tail()}")
            part = os.read(descriptor, 1 << 20)
            if not part:
                raise ContenderError(self._tail())
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        content: dict[str, Any] = json.loads(line)
        return content

    def _tail(self) -> str:
        return self._log_path.read_text(errors="replace")[-_TAIL_CHARS:].strip()

    def _processes(self) -> list[psutil.Process]:
        try:
            first = psutil.Process(self._process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _cpu_seconds(self) -> float:
        total = 0.0
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
