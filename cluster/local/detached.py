"""Starts a supervisor that outlives the command, and follows its start through a pipe.

Not another supervisor: the same one, in a process that has left the terminal's session. The
starting command only shows what it is told; Ctrl-C before the end of the start ends that too.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator

from cluster.errors import CommandError, InterruptedStartError, StartError

from .folder import RunFolder, RunState, create_run, open_run
from .interrupts import Interrupts
from .progress import EventPipe, PhaseEvent, StartListener, parse_event
from .supervisor import Deployment, Supervisor

_POLL_S = 0.1


class DetachedStart:
    """A supervisor that has just been started in the background.

    Made before anything starts a thread here, for it forks; then `follow` shows what it does.
    """

    def __init__(self, name: str, deployment: Deployment) -> None:
        run = create_run(name)
        self._name = name
        self._reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(self._reader)
            _become_supervisor(run, deployment, writer)
        os.close(writer)
        os.waitpid(child, 0)

    def follow(self, listener: StartListener, interrupts: Interrupts) -> RunState:
        """Tell `listener` what happens; returns the run's state once it is ready.

        Raises:
            StartError: the root cause of what did not come up; everything is cleaned up.
            InterruptedStartError: a signal came before it was ready; it was ended.
        """
        has_passed_on = False
        last = PhaseEvent("begin", "ray")
        for line in _lines(self._reader):
            if line:
                last = parse_event(line)
                listener.on_event(last)
                if (last.kind, last.phase) == ("end", "ready"):
                    return open_run(self._name).state
            elif not has_passed_on and interrupts.num_received:
                has_passed_on = True
                _pass_on_interrupt(self._name)
        if interrupts.num_received:
            raise InterruptedStartError("stopped before it was ready")
        raise StartError(last.message or "the supervisor ended without a word", hint=last.hint)


def _pass_on_interrupt(name: str) -> None:
    with contextlib.suppress(CommandError):
        owner = open_run(name).state.owner.find()
        if owner is not None:
            owner.send_signal(signal.SIGTERM)


def _lines(reader: int) -> Iterator[str]:
    """Lines from the pipe until its end; an empty one whenever a while has passed without."""
    rest = b""
    while True:
        readable, _, _ = select.select([reader], [], [], _POLL_S)
        if not readable:
            yield ""
            continue
        chunk = os.read(reader, 65_536)
        if not chunk:
            os.close(reader)
            return
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.decode() for line in lines if line)


def _become_supervisor(run: RunFolder, deployment: Deployment, writer: int) -> None:
    """Leave the terminal, supervise the run to its end, and never return."""
    os.setsid()
    if os.fork() != 0:
        os._exit(0)
    exit_code = 1
    try:
        run.adopt()
        _redirect_to_log(run)
        with Interrupts() as interrupts:
            exit_code = _supervise(run, deployment, EventPipe(writer), interrupts)
    except BaseException as exc:
        print(f"shoal: {exc!r}", file=sys.stderr, flush=True)  # noqa: T201
    finally:
        os._exit(exit_code)


def _supervise(
    run: RunFolder, deployment: Deployment, listener: StartListener, interrupts: Interrupts
) -> int:
    supervisor = Supervisor(run, deployment, listener=listener, interrupts=interrupts)
    try:
        supervisor.start()
        supervisor.watch()
    except CommandError as exc:
        print(f"shoal: {exc.message}", file=sys.stderr, flush=True)  # noqa: T201
        return exc.exit_code
    finally:
        supervisor.stop()
    return 0


def _redirect_to_log(run: RunFolder) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    log = os.open(run.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(null)
    os.close(log)
    os.chdir(run.path)
