"""A model in the cache of the hub's own clients, where one download serves every program.

Its layout is theirs, and public: `models--org--name/` with `blobs/<digest>`, `refs/<revision>` and
`snapshots/<commit>/<name>`, which are links to blobs. The one decision: a revision that is there
is used as it is, without a look at the network; a branch is followed when it is fetched, not at
every start.
"""

from __future__ import annotations

import os
from pathlib import Path

from cluster.errors import DownloadError
from serve.checkpoint import inspect_checkpoint
from serve.errors import CheckpointError

from .architecture import OnShape, check_architecture
from .hub import UNWANTED, WANTED, Hub, RemoteFile, Snapshot
from .lock import locked
from .refusal import OFFLINE_HINT
from .transfer import PATIENT, Pace, Transfer
from .watcher import Watcher

_ELSEWHERE = (
    "HF_HOME names another place for what is fetched from a hub; `shoal download` fetches into a"
    " folder that you name."
)


class HubCache:
    """The cache of HF_HUB_CACHE (HF_HOME) of this user."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def from_environment(cls) -> HubCache:
        """Where the hub's own clients keep what they fetch."""
        from huggingface_hub import constants

        return cls(Path(constants.HF_HUB_CACHE))

    def find(self, repository: str, revision: str, *, hub: Hub) -> Path | None:
        """The folder of a whole snapshot; None where there is none, or parts of it are missing.

        Raises:
            DownloadError: it cannot be served, and the hub is not to be asked for another one.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            found = snapshot_download(
                repository,
                revision=revision,
                cache_dir=self.path,
                allow_patterns=list(WANTED),
                ignore_patterns=list(UNWANTED),
                local_files_only=True,
            )
            inspect_checkpoint(Path(found))
        except (LocalEntryNotFoundError, HFValidationError) as exc:
            if hub.is_offline:
                raise self._not_here(f"{repository} at {revision} is not in") from exc
            return None
        except CheckpointError as exc:
            if hub.is_offline:
                raise _unservable(repository, exc) from exc
            return None
        if (Path(found) / "tokenizer.json").is_file():
            return Path(found)
        if hub.is_offline:
            raise self._not_here(f"tokenizer.json of {repository} at {revision} is not in")
        return None

    def _not_here(self, what: str) -> DownloadError:
        return DownloadError(
            f"{what} {self.path}, and HF_HUB_OFFLINE is set",
            hint=f"{OFFLINE_HINT} HF_HOME names another place where it may be.",
        )

    def fetch(
        self,
        repository: str,
        *,
        revision: str,
        hub: Hub,
        watcher: Watcher,
        on_shape: OnShape,
        pace: Pace = PATIENT,
    ) -> Path:
        """Bring a snapshot here; returns its folder. What is here of it is not fetched again.

        Raises:
            DownloadError: what is wrong with the hub, the repository or the volume.
            InterruptedStartError: the watcher wanted it to end.
        """
        snapshot = hub.describe(repository, revision)
        root = self.path / f"models--{repository.replace('/', '--')}"
        blobs = root / "blobs"
        try:
            blobs.mkdir(parents=True, exist_ok=True)
            with locked(root, watcher):
                size_gb = sum(file.size for file in snapshot.files) / 1e9
                watcher.tell(
                    f"{repository} at {snapshot.commit[:12]}: {len(snapshot.files)} files,"
                    f" {size_gb:.2f} GB to {root}"
                )
                transfer = Transfer(
                    hub, snapshot, root,
                    place=lambda file: blobs / file.digest, elsewhere=_ELSEWHERE,
                    watcher=watcher, pace=pace,
                )  # fmt: skip
                transfer.run([file for file in snapshot.files if not file.is_weights])
                check_architecture(repository, blobs / _config_of(snapshot).digest, on_shape)
                transfer.run([file for file in snapshot.files if file.is_weights])
                folder = _link(root, snapshot)
                _check(repository, folder)
                _write_reference(root / "refs" / revision, snapshot.commit)
                transfer.clean()
                return folder
        except OSError as exc:
            raise DownloadError(
                f"cannot use {root}: {exc.strerror or exc}",
                hint=_ELSEWHERE,
            ) from exc


def _config_of(snapshot: Snapshot) -> RemoteFile:
    return next(file for file in snapshot.files if file.name == "config.json")


def _link(root: Path, snapshot: Snapshot) -> Path:
    """Make the snapshot's folder out of links; the weights' come last."""
    folder = root / "snapshots" / snapshot.commit
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(snapshot.files, key=lambda file: file.is_weights):
        draft = folder / f".{file.name}.new"
        draft.unlink(missing_ok=True)
        draft.symlink_to(os.path.relpath(root / "blobs" / file.digest, folder))
        draft.replace(folder / file.name)
    return folder


def _write_reference(path: Path, commit: str) -> None:
    """Say what a branch meant; a commit names itself."""
    if path.name == commit:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(commit, encoding="ascii")
    draft.replace(path)


def _check(repository: str, folder: Path) -> None:
    try:
        inspect_checkpoint(folder)
    except CheckpointError as exc:
        raise _unservable(repository, exc) from exc


def _unservable(repository: str, exc: CheckpointError) -> DownloadError:
    return DownloadError(f"{repository} cannot be served: {exc.message}")
