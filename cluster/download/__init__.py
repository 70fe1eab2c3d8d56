"""A model's weights, from a hub into a folder, once: what `shoal download` and init containers run.

Not a cache of many models, and not huggingface_hub's snapshot: that throws the part of a file away
when its process ends, and takes a folder for complete because it is there. The one decision: a
folder is complete when its marker says so, and the marker is written after everything else; all
before it may be cut at any byte, by any kill, and goes on from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from cluster.errors import DownloadError
from serve.catalog import ModelShape
from serve.checkpoint import inspect_checkpoint
from serve.errors import CheckpointError

from .hub import Hub, Snapshot
from .lock import locked
from .marker import Marker
from .transfer import Pace, Transfer

__all__ = ["DEFAULT_REVISION", "Hub", "Marker", "Pace", "download_weights"]

DEFAULT_REVISION = "main"
_CONFIG = "config.json"
_PATIENT = Pace()


def download_weights(
    repository: str,
    folder: Path,
    *,
    revision: str = DEFAULT_REVISION,
    hub: Hub,
    tell: Callable[[str], None],
    pace: Pace = _PATIENT,
) -> Marker:
    """Bring `folder` to hold the repository's weights; one that does is left alone, offline too.

    `tell` gets a line of progress every few seconds. A branch is looked up once: a folder that has
    its weights does not follow it.

    Raises:
        DownloadError: what is wrong with the hub, the repository or the volume, in plain words.
    """
    try:
        found = _complete(folder, repository, revision)
        if found is not None:
            return found
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, tell):
            found = _complete(folder, repository, revision)
            if found is not None:
                return found
            snapshot = hub.describe(repository, revision)
            tell(f"{repository} at {snapshot.commit[:12]}: {len(snapshot.files)} files to {folder}")
            _fetch(snapshot, folder, Transfer(hub, snapshot, folder, tell=tell, pace=pace))
            marker = Marker(repository, revision, snapshot.commit, snapshot.sizes())
            marker.write(folder)
            return marker
    except OSError as exc:
        raise DownloadError(f"cannot use {folder}: {exc.strerror or exc}") from exc


def _complete(folder: Path, repository: str, revision: str) -> Marker | None:
    marker = Marker.read(folder)
    if marker is None or not marker.is_of(repository, revision) or marker.missing(folder):
        return None
    return marker


def _fetch(snapshot: Snapshot, folder: Path, transfer: Transfer) -> None:
    former = Marker.read(folder)
    if former is not None:
        former.remove(folder, keep=snapshot.sizes().keys())
    transfer.run([file for file in snapshot.files if not file.is_weights])
    _check_architecture(snapshot.repository, folder)
    transfer.run([file for file in snapshot.files if file.is_weights])
    try:
        inspect_checkpoint(folder)
    except CheckpointError as exc:
        raise DownloadError(f"{snapshot.repository} cannot be served: {exc.message}") from exc
    transfer.clean()


def _check_architecture(repository: str, folder: Path) -> None:
    """Refuse another architecture before its weights are fetched."""
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        ModelShape.from_config(config)
    except (ValueError, AttributeError, CheckpointError) as exc:
        reason = exc.message if isinstance(exc, CheckpointError) else f"{_CONFIG} is no JSON object"
        raise DownloadError(
            f"{repository} cannot be served: {reason}", hint="Shoal serves Qwen2 and Qwen2.5."
        ) from exc
