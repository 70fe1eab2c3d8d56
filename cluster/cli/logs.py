"""`shoal logs`: the last lines of a run's logs, and those to come."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Name

if TYPE_CHECKING:
    from cluster.local.folder import RunFolder

_POLL_S = 0.2
_TAIL_BYTES = 65_536


def logs(
    name: Name = "default",
    num_lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Last lines a file.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Also what Ray itself writes.")] = False,
) -> None:
    """Print the logs of the supervisor, the HTTP tier, the replicas and their shards."""
    from cluster.local.folder import open_run

    run = open_run(name)
    offsets: dict[Path, int] = {}
    for path in log_files(run, has_ray=every):
        offsets[path] = _print_tail(path, num_lines)
    try:
        while follow and run.path.exists():
            time.sleep(_POLL_S)
            for path in log_files(run, has_ray=every):
                offsets[path] = _print_new(path, offsets.get(path, 0))
    except KeyboardInterrupt:
        pass


def log_files(run: RunFolder, *, has_ray: bool) -> list[Path]:
    """The run's log files that are not empty: ours, or with `has_ray` every one."""
    folder = run.session_logs_path
    patterns = ["**/*.log", "*.out", "*.err"] if has_ray else ["serve/*.log", "worker-*.err"]
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return [path for path in (run.log_path, *sorted(found)) if _size(path) > 0]


def _print_tail(path: Path, num_lines: int) -> int:
    """Print the last lines; returns the offset that follows them."""
    size = _size(path)
    with path.open("rb") as file:
        file.seek(max(0, size - _TAIL_BYTES))
        text = file.read(_TAIL_BYTES).decode(errors="replace")
    lines = text.splitlines()[-num_lines:] if num_lines else []
    if lines:
        print(f"==> {path}", *lines, sep="\n", flush=True)
    return size


def _print_new(path: Path, offset: int) -> int:
    size = _size(path)
    if size <= offset:
        return size
    with path.open("rb") as file:
        file.seek(offset)
        text = file.read(size - offset).decode(errors="replace")
    print("\n".join(f"{path.name}: {line}" for line in text.splitlines()), flush=True)
    return size


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
