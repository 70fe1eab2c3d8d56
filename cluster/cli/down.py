"""`shoal down`: end a running Shoal, or clean up after one that was killed."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Name

if TYPE_CHECKING:
    from cluster.local.folder import RunFolder

_POLL_S = 0.1


def down(
    name: Name = "default",
    now: Annotated[
        bool, typer.Option("--now", help="Do not wait for running answers to finish.")
    ] = False,
) -> None:
    """End a running Shoal: running answers finish, then every process goes."""
    from rich.console import Console

    from cluster.local.folder import open_run
    from cluster.local.sweep import end_run

    run = open_run(name)
    console = Console(soft_wrap=True, highlight=False)
    if run.state.is_owned():
        console.print(f"Ending {name!r} at {run.state.address} ...")
        _end_owner(run, is_now=now)
    if run.path.exists():
        end_run(run)
    console.print("Ended; nothing is left behind.")


def _end_owner(run: RunFolder, *, is_now: bool) -> None:
    """Ask the supervisor to end and wait until it has; Ctrl-C asks again, without draining."""
    _signal_owner(run)
    if is_now:
        time.sleep(_POLL_S)  # two signals at once would count as one
        _signal_owner(run)
    while run.state.is_owned():
        try:
            time.sleep(_POLL_S)
        except KeyboardInterrupt:
            _signal_owner(run)


def _signal_owner(run: RunFolder) -> None:
    owner = run.state.owner.find()
    if owner is not None:
        owner.send_signal(signal.SIGTERM)
