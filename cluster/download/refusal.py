"""What a hub's no means: errors of `huggingface_hub` and its HTTP client, in plain words.

Not who asks (`hub`) and not who tries again (`transfer`). The one decision: a message names what
was asked for, down to the file, and the hint says what its reader can do about it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.errors import DownloadError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

OFFLINE_HINT = "Unset HF_HUB_OFFLINE, or give a folder that has the files."
CHANGED_HINT = (
    "It has changed on the hub, or the mirror is broken: start again. What has arrived whole is"
    " kept."
)
_KEPT = "What has arrived is kept, and the next start goes on from there."
_TOKEN_HINT = (
    "Set HF_TOKEN to a token that may read it, or log in with `hf auth login`; in the chart: a"
    " Secret named in auth.hfToken."
)


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


@dataclass(frozen=True, slots=True)
class Asked:
    """What a hub is asked for; `file` is empty where it is for the repository."""

    endpoint: str
    has_token: bool
    repository: str
    revision: str
    file: str = ""

    def __str__(self) -> str:
        if not self.file:
            return self.repository
        return f"{self.file} of {self.repository} at {self.revision[:12]}"

    @property
    def page(self) -> str:
        """The repository, as a browser shows it."""
        return f"{self.endpoint}/{self.repository}"


@contextlib.contextmanager
def plain_errors(asked: Asked) -> Iterator[None]:
    """Raise what goes wrong inside as a `HubError`."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except HfHubHTTPError as exc:
        raise HubError(_refusal(asked, exc), status=exc.response.status_code) from exc
    except HFValidationError as exc:
        error = DownloadError(
            f"{asked.repository!r} is not the name of a repository: {exc}",
            hint="It is written as Qwen/Qwen2.5-7B-Instruct; a folder must exist.",
        )
        raise HubError(error, status=400) from exc
    except (httpx2.HTTPError, httpx2.InvalidURL, ConnectionError) as exc:
        raise HubError(_unreachable(asked, exc), status=0) from exc


def _unreachable(asked: Asked, exc: Exception) -> DownloadError:
    where, storage = asked.endpoint, _storage_of(asked, exc)
    if asked.file:
        where = f"{storage}, where {where} keeps" if storage else f"{where} for"
        where += f" {asked.file}"
    return DownloadError(
        f"cannot reach {where}: {str(exc) or type(exc).__name__}",
        hint="Look at the network, name a mirror in HF_ENDPOINT, or give a folder that has the"
        f" files (`shoal up --model FOLDER`). {_KEPT}",
    )


def _refusal(asked: Asked, exc: HfHubHTTPError) -> DownloadError:
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    said = f"(HTTP {exc.response.status_code}"
    words = exc.server_message or exc.response.reason_phrase
    said += f": {words})" if words else ")"
    if isinstance(exc, RevisionNotFoundError):
        return DownloadError(
            f"{asked.endpoint} has no revision {asked.revision!r} of {asked.repository} {said}",
            hint=f"It is a branch, a tag or a whole commit of {asked.page}.",
        )
    if isinstance(exc, GatedRepoError):
        whose = "the account of this token" if asked.has_token else "your account"
        return DownloadError(
            f"{asked.repository} is gated: its owner wants terms accepted first {said}",
            hint=f"Accept them at {asked.page} with {whose}. {_TOKEN_HINT}",
        )
    if asked.file:
        return _refusal_of_file(asked, exc, said)
    return _refusal_of_repository(asked, exc.response.status_code, said)


def _refusal_of_repository(asked: Asked, status: int, said: str) -> DownloadError:
    if status in (401, 403):
        what = "refuses this token" if asked.has_token else "wants a token"
        return DownloadError(
            f"{asked.endpoint} {what} for {asked}, or has no such repository {said}",
            hint=f"Look at the spelling. {_TOKEN_HINT}",
        )
    if status == 404:
        return DownloadError(
            f"{asked.endpoint} has no {asked} {said}",
            hint="Look at the spelling; a folder must exist to be meant.",
        )
    return _refusal_for_now(asked, asked.endpoint, status, said)


def _refusal_of_file(asked: Asked, exc: HfHubHTTPError, said: str) -> DownloadError:
    """The repository was described before: its files are there, or were."""
    status = exc.response.status_code
    who = _storage_of(asked, exc) or asked.endpoint
    if status in (401, 403):
        return DownloadError(f"{who} refuses {asked} {said}", hint=f"{_TOKEN_HINT} {_KEPT}")
    if status == 404:
        return DownloadError(
            f"{who} has no {asked}, though {asked.endpoint} listed it {said}",
            hint="The revision may have changed or gone meanwhile: start again. If it stays so,"
            f" the repository or the mirror is not whole. {_KEPT}",
        )
    if status == 416:
        return DownloadError(f"{asked} is shorter than it was said to be {said}", hint=CHANGED_HINT)
    return _refusal_for_now(asked, who, status, said)


def _refusal_for_now(asked: Asked, who: str, status: int, said: str) -> DownloadError:
    if status == 429:
        return DownloadError(
            f"{who} was asked too often, now for {asked} {said}",
            hint="Wait some minutes and start again. With a token (HF_TOKEN, or `hf auth login`)"
            f" a hub lets you ask more often. {_KEPT}",
        )
    return DownloadError(
        f"{who} does not give {asked} {said}",
        hint=f"Try again later, or name a mirror in HF_ENDPOINT. {_KEPT}",
    )


def _storage_of(asked: Asked, exc: Exception) -> str:
    """Where a hub sent its client for a large file: a firewall may know the hub and not this.

    Scheme, host and port; empty where it was the hub itself, or nobody knows.
    """
    try:
        url = exc.request.url  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return ""
    origin = f"{url.scheme}://{url.netloc.decode('ascii')}"
    return "" if asked.endpoint.startswith(origin) else origin
