"""Decides, before anything starts, who may use the API: this machine, holders of keys, or anyone.

Not the check of a request (`serve.ingress.auth`), which refuses to start undecided. The one
decision: beyond loopback there is no default but refusal; either there is a key that works, or
somebody wrote that everyone is welcome.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import UsageError
from cluster.keys import FileStore, create_key, default_path, has_usable_key, list_keys
from serve.config import HttpConfig

FIRST_KEY_NAME = "first"


@dataclass(frozen=True, slots=True)
class Access:
    """What was decided: `http` with its `keys_file`, and the key that was made for it, if any."""

    http: HttpConfig
    new_key: str | None = None

    @property
    def has_keys(self) -> bool:
        """Whether every request needs a key."""
        return self.http.keys_file is not None

    @property
    def is_open_to_anyone(self) -> bool:
        """Whether other machines are served without a key."""
        return not self.has_keys and not self.http.is_loopback


def decide_access(http: HttpConfig, *, wants_new_key: bool = False) -> Access:
    """Settle `http`; with `wants_new_key`, a file that holds no key gets one named `first`.

    Raises:
        UsageError: others could reach the API and nobody decided who may, or the file of keys has
            none that works.
    """
    if http.allow_anonymous:
        if wants_new_key:
            raise UsageError("--new-key and --allow-anonymous exclude each other")
        return Access(http)
    path = http.keys_file or default_path()
    if wants_new_key:
        return _with_key(http, path)
    if http.keys_file is not None:
        if not has_usable_key(list_keys(FileStore(path))):
            raise UsageError(
                f"no key in {path} works: every request would be refused",
                hint=f"Make one: {_create_command(path)}",
            )
        return Access(http)
    if http.is_loopback:
        return Access(http)
    if not has_usable_key(list_keys(FileStore(path))):
        raise UsageError(
            f"http.host {http.host} can be reached from other machines, and no API key in {path}"
            " works",
            hint=f"Make a key: {_create_command(path)}\n"
            "Or make one with the start: --new-key\n"
            "Or serve anyone who can reach it: --allow-anonymous",
        )
    return Access(_with_file(http, path))


def _with_key(http: HttpConfig, path: Path) -> Access:
    store = FileStore(path)
    keys = list_keys(store)
    if not keys:
        return Access(_with_file(http, path), create_key(store, FIRST_KEY_NAME))
    if not has_usable_key(keys):
        raise UsageError(
            f"every key in {path} has expired, so none is made by itself",
            hint=f"Make one: {_create_command(path)}",
        )
    return Access(_with_file(http, path))


def _with_file(http: HttpConfig, path: Path) -> HttpConfig:
    """`http` with a file that the processes of the server find from any folder."""
    return http.model_copy(update={"keys_file": Path(os.path.abspath(path))})


def _create_command(path: Path) -> str:
    suffix = "" if path == default_path() else f" --file {path}"
    return f"shoal keys create NAME{suffix}"
