"""A hub's public HTTP API, as far as weights need it: what a revision holds, and bytes from a file.

Not a login and not an upload. The variables of its own clients are respected: HF_ENDPOINT (a
mirror), HF_TOKEN, HF_HUB_OFFLINE. The one decision: only files that a model needs and that cannot
run code are looked at: safetensors, JSON, the tokenizer's texts and the chat template.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from cluster.errors import DownloadError

if TYPE_CHECKING:
    import httpx

_ENDPOINT = "https://huggingface.co"
_WEIGHTS = "*.safetensors"
_WANTED = (_WEIGHTS, "*.json", "merges.txt", "vocab.txt", "*.jinja")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_CONNECT_TIMEOUT_S = 15.0
_READ_TIMEOUT_S = 60.0
_TRUE = {"1", "on", "yes", "true"}
_TOKEN_HINT = (
    "Set HF_TOKEN to a token that may read it; in the chart: a Secret named in auth.hfToken."
)


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


class HubError(Exception):
    """The hub refused; `status` is its HTTP status, 0 where it could not be reached."""

    def __init__(self, error: DownloadError, *, status: int) -> None:
        super().__init__(error.message)
        self.error = error
        self.status = status

    @property
    def is_temporary(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status in (0, 408, 429) or self.status >= 500


class Hub:
    """One hub, asked over HTTP with the user's token."""

    def __init__(self, endpoint: str = _ENDPOINT, *, token: str = "", is_offline: bool = False):
        self.endpoint = endpoint.rstrip("/")
        self.is_offline = is_offline
        self._token = token
        self._client: httpx.Client | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Hub:
        """The hub that the variables of the hub's own clients name."""
        return cls(
            environment.get("HF_ENDPOINT") or _ENDPOINT,
            token=environment.get("HF_TOKEN", "").strip(),
            is_offline=environment.get("HF_HUB_OFFLINE", "").strip().lower() in _TRUE,
        )

    def describe(self, repository: str, revision: str) -> Snapshot:
        """Look up a branch, tag or commit.

        Raises:
            DownloadError: it cannot be had, or it has no weights that Shoal reads.
        """
        if self.is_offline:
            raise DownloadError(
                f"{repository} at {revision} is not in the folder, and HF_HUB_OFFLINE is set",
                hint="Unset HF_HUB_OFFLINE, or put the weights there and switch the download off.",
            )
        path = f"/api/models/{quote(repository)}/revision/{quote(revision, safe='')}?blobs=true"
        try:
            with self._get(path, {}) as response:
                response.read()
                return _parse(repository, response.json())
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
        path = f"/{quote(snapshot.repository)}/resolve/{quote(snapshot.commit)}/{quote(file.name)}"
        headers = {"Accept-Encoding": "identity"}  # an offset counts bytes of the file itself
        if offset:
            headers["Range"] = f"bytes={offset}-"
        with self._get(path, headers) as response:
            yield response.status_code == 206, response.iter_raw()

    @contextlib.contextmanager
    def _get(self, path: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
        import httpx

        if self._client is None:
            timeout = httpx.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
            self._client = httpx.Client(follow_redirects=True, timeout=timeout)
        # The client drops this header where a redirect leads to another host.
        sent = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        try:
            with self._client.stream(
                "GET", self.endpoint + path, headers={**sent, **headers}
            ) as response:
                if not response.is_success:
                    response.read()
                    raise HubError(self._refusal(path, response), status=response.status_code)
                yield response
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            reason = str(exc) or type(exc).__name__
            error = DownloadError(
                f"cannot reach {self.endpoint}: {reason}",
                hint="Look at the network, or name a mirror in HF_ENDPOINT; what has arrived is"
                " kept, and the next start goes on from there.",
            )
            raise HubError(error, status=0) from exc

    def _refusal(self, path: str, response: httpx.Response) -> DownloadError:
        status, code = response.status_code, response.headers.get("x-error-code", "")
        said = response.headers.get("x-error-message", "") or response.reason_phrase
        where = path.partition("?")[0]
        if code == "RevisionNotFound":
            return DownloadError(f"{self.endpoint} has no such revision: {where}")
        if code == "GatedRepo":
            return DownloadError(
                f"{where} is gated: its owner wants terms accepted first (HTTP {status}: {said})",
                hint=f"Accept them on its page at {self.endpoint}. {_TOKEN_HINT}",
            )
        if status in (401, 403):
            what = "refuses this token" if self._token else "wants a token"
            return DownloadError(
                f"{self.endpoint} {what} for {where}, or has no such repository"
                f" (HTTP {status}: {said})",
                hint=_TOKEN_HINT,
            )
        if status == 404:
            return DownloadError(f"{self.endpoint} has no {where}", hint="Look at the spelling.")
        return DownloadError(f"{self.endpoint} answers HTTP {status} for {where}: {said}")


def _parse(repository: str, answer: Mapping[str, Any]) -> Snapshot:
    names = [entry["rfilename"] for entry in answer["siblings"]]
    files = tuple(
        _parse_file(entry)
        for entry in answer["siblings"]
        if "/" not in entry["rfilename"]
        and not entry["rfilename"].startswith(".")
        and any(fnmatch(entry["rfilename"], pattern) for pattern in _WANTED)
    )
    if not any(file.is_weights for file in files):
        pickles = [name for name in names if any(fnmatch(name, kind) for kind in _PICKLES)]
        but = f": {pickles[0]} is a pickle, which can run code" if pickles else ""
        raise DownloadError(f"{repository} has no *.safetensors{but}")
    if "config.json" not in names:
        raise DownloadError(f"{repository} has no config.json")
    return Snapshot(repository, str(answer["sha"]), files)


def _parse_file(entry: Mapping[str, Any]) -> RemoteFile:
    large = entry.get("lfs")
    size, digest = (large["size"], large["sha256"]) if large else (entry["size"], entry["blobId"])
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"digest {digest[:80]!r}")
    return RemoteFile(entry["rfilename"], int(size), digest)
