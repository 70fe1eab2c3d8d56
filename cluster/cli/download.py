"""`shoal download`: a model's weights from a hub into a folder, once."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer


def download(
    repository: Annotated[
        str, typer.Argument(help="Where a hub has them, as Qwen/Qwen2.5-7B-Instruct.")
    ],
    folder: Annotated[Path, typer.Argument(help="Folder that holds this model and nothing else.")],
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
) -> None:
    """Fetch a model's weights into a folder; a folder that has them is left alone.

    HF_TOKEN, HF_ENDPOINT (a mirror) and HF_HUB_OFFLINE are respected. Cut short, it goes on from
    there the next time; several may run on one shared volume.
    """
    from cluster.download import Hub, Watcher, download_weights

    class Lines(Watcher):
        def tell(self, line: str) -> None:
            print(line, flush=True)

    for number in (signal.SIGTERM, signal.SIGINT):  # the first process of a container has no others
        signal.signal(number, _stop)
    marker = download_weights(
        repository,
        folder,
        revision=revision,
        hub=Hub.from_environment(),
        watcher=Lines(),
    )
    size_gb = sum(marker.files.values()) / 1e9
    print(
        f"{folder} holds {marker.repository} at {marker.commit[:12]}:"
        f" {len(marker.files)} files, {size_gb:.2f} GB",
        flush=True,
    )


def _stop(number: int, frame: FrameType | None) -> None:
    """End at once: what has arrived is kept, and there is nothing to put in order."""
    print("stopped; the next start goes on from here", flush=True)
    os._exit(128 + number)
