"""A model's weights from a hub: into a folder (`shoal download`, init containers) or its cache.

A folder holds one model and has a marker; the cache is that of the hub's own clients (`cache`),
which `shoal up` fills and uses. The one decision: a folder is complete when its marker says so,
and the marker is written after everything else; all before it may be cut at any byte, by any kill,
and goes on from there.
"""

from __future__ import annotations

from pathlib import Path

from cluster.errors import DownloadError
from serve.catalog import ModelShape
from serve.checkpoint import inspect_checkpoint
from serve.errors import CheckpointError

from .architecture import check_architecture
from .cache import HubCache
from .hub import Hub, Snapshot
from .lock import locked
from .marker import Marker
from .transfer import PATIENT, Pace, Transfer
from .watcher import Watcher

__all__ = [
    "DEFAULT_REVISION",
    "PATIENT",
    "Hub",
    "HubCache",
    "Marker",
    "Pace",
    "Watcher",
    "download_weights",
]

DEFAULT_REVISION = "main"
_ELSEWHERE = "Give a folder on a larger volume; in the chart: weights.pvc.size."


def download_weights(
    repository: str,
    folder: Path,
    *,
    revision: str = DEFAULT_REVISION,
    hub: Hub,
    watcher: Watcher,
    pace: Pace = PATIENT,
) -> Marker:
    """Bring `folder` to hold the repository's weights; one that does is left alone, offline too.

    A branch is looked up once: a folder that has its weights does not follow it.

    Raises:
        DownloadError: what is wrong with the hub, the repository or the volume, in plain words.
    """
    try:
        found = _complete(folder, repository, revision)
        if found is not None:
            return found
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, watcher):
            found = _complete(folder, repository, revision)
            if found is not None:
                return found
            snapshot = hub.describe(repository, revision)
            watcher.tell(
                f"{repository} at {snapshot.commit[:12]}: {len(snapshot.files)} files to {folder}"
            )
            transfer = Transfer(
                hub, snapshot, folder,
                place=lambda file: folder / file.name, elsewhere=_ELSEWHERE,
                watcher=watcher, pace=pace,
            )  # fmt: skip
            _fetch(snapshot, folder, transfer)
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
    check_architecture(snapshot.repository, folder / "config.json", _accept)
    transfer.run([file for file in snapshot.files if file.is_weights])
    try:
        inspect_checkpoint(folder)
    except CheckpointError as exc:
        raise DownloadError(f"{snapshot.repository} cannot be served: {exc.message}") from exc
    transfer.clean()


def _accept(shape: ModelShape) -> None:
    """Another machine may run it: nothing is known here of its memory."""
