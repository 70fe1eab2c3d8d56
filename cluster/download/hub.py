"""A hub as far as weights need it: what a revision holds, and bytes from a file.

`huggingface_hub` asks and says no (endpoint, login, gated repositories, offline mode): here its
answers become a `Snapshot`; its errors become plain words in `refusal`. The one decision: the bytes
themselves are read here. Its own download throws a part away when its process ends, and does not
check digests. Only files that a model needs and that cannot run code are looked at: safetensors,
JSON, the tokenizer's texts and the chat template.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from cluster.errors import DownloadError
from serve.checkpoint import is_pickle

from .refusal import OFFLINE_HINT, Asked, HubError, plain_errors

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo
    from huggingface_hub.hf_api import RepoSibling

_WEIGHTS = "*.safetensors"
WANTED = (_WEIGHTS, "*.json", "merges.txt", "vocab.txt", "*.jinja")
UNWANTED = ("*/*", ".*")
_NEEDED = ("config.json", "tokenizer.json")
_NEEDED_HINT = "Shoal serves repositories in the layout of transformers, with a fast tokenizer."
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_CONNECT_TIMEOUT_S = 15.0
_READ_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file: its size in bytes and its digest, SHA-256 or git's SHA-1 of a blob."""

    name: str
    size: int
    digest: str

    @property
    def is_weights(self) -> bool:
        return fnmatch(self.name, _WEIGHTS)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a commit of a repository holds, of what a model needs."""

    repository: str
    commit: str
    files: tuple[RemoteFile, ...]

    def sizes(self) -> dict[str, int]:
        """Bytes of every file, by name."""
        return {file.name: file.size for file in self.files}


class Hub:
    """One hub, asked over HTTP with the user's token."""

    def __init__(self, endpoint: str, *, token: str = "", is_offline: bool = False) -> None:
        self.endpoint = endpoint.rstrip("/")
        self.is_offline = is_offline
        self._token = token

    @classmethod
    def from_environment(cls) -> Hub:
        """The hub of HF_ENDPOINT, HF_TOKEN (or a login) and HF_HUB_OFFLINE."""
        from huggingface_hub import constants, get_token

        return cls(
            constants.ENDPOINT, token=get_token() or "", is_offline=constants.is_offline_mode()
        )

    def describe(self, repository: str, revision: str) -> Snapshot:
        """Look up a branch, tag or commit.

        Raises:
            DownloadError: it cannot be had, or it has no weights that Shoal reads.
        """
        if self.is_offline:
            raise DownloadError(
                f"{repository} at {revision} is not on this machine, and HF_HUB_OFFLINE is set",
                hint=OFFLINE_HINT,
            )
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.endpoint, token=self._token or False)
        try:
            with plain_errors(self._asked(repository, revision)):
                info = api.model_info(
                    repository, revision=revision, files_metadata=True, timeout=_CONNECT_TIMEOUT_S
                )
            return _parse(repository, info)
        except HubError as exc:
            raise exc.error from exc
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise DownloadError(
                f"{self.endpoint} does not answer as a hub does: {exc!r}",
                hint="Look at HF_ENDPOINT: it is the address of a hub or of a mirror of one.",
            ) from exc

    @contextlib.contextmanager
    def read(
        self, snapshot: Snapshot, file: RemoteFile, *, offset: int
    ) -> Iterator[tuple[bool, Iterator[bytes]]]:
        """The file's bytes; the first value says whether they begin at `offset` or at 0.

        Raises:
            HubError: the hub refused or went away, also while the bytes are read.
        """
        import httpx2
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
        )

        url = hf_hub_url(
            snapshot.repository, file.name, revision=snapshot.commit, endpoint=self.endpoint
        )
        headers = build_hf_headers(token=self._token or False)
        headers["Accept-Encoding"] = "identity"  # an offset counts bytes of the file itself
        if offset:
            headers["Range"] = f"bytes={offset}-"
        timeout = httpx2.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
        with (
            plain_errors(self._asked(snapshot.repository, snapshot.commit, file.name)),
            get_session().stream(
                "GET", url, headers=headers, timeout=timeout, follow_redirects=True
            ) as response,
        ):
            hf_raise_for_status(response)
            yield response.status_code == 206, response.iter_raw()

    def _asked(self, repository: str, revision: str, file: str = "") -> Asked:
        return Asked(self.endpoint, bool(self._token), repository, revision, file)


def is_wanted(name: str) -> bool:
    """Whether a model needs the file, which is one of the repository's top folder."""
    return any(fnmatch(name, pattern) for pattern in WANTED) and not any(
        fnmatch(name, pattern) for pattern in UNWANTED
    )


def _parse(repository: str, info: ModelInfo) -> Snapshot:
    siblings = info.siblings or []
    names = [entry.rfilename for entry in siblings]
    files = tuple(_parse_file(entry) for entry in siblings if is_wanted(entry.rfilename))
    if not any(file.is_weights for file in files):
        pickles = [name for name in names if is_pickle(name)]
        but = f": {pickles[0]} is a pickle, which can run code" if pickles else ""
        raise DownloadError(f"{repository} has no *.safetensors{but}")
    for name in _NEEDED:
        if name not in names:
            raise DownloadError(f"{repository} has no {name}", hint=_NEEDED_HINT)
    return Snapshot(repository, _digest(info.sha), files)


def _parse_file(entry: RepoSibling) -> RemoteFile:
    if entry.lfs is not None:
        return RemoteFile(entry.rfilename, int(entry.lfs.size), _digest(entry.lfs.sha256))
    if entry.size is None:
        raise ValueError(f"{entry.rfilename} without a size")
    return RemoteFile(entry.rfilename, entry.size, _digest(entry.blob_id))


def _digest(text: str | None) -> str:
    """`text`, which becomes a file's name: nothing but a digest may."""
    if text is None or not _DIGEST.fullmatch(text):
        raise ValueError(f"digest {str(text)[:80]!r}")
    return text
