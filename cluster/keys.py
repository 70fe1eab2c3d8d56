"""Makes, lists and revokes API keys in a file or a Secret, and finds the key of whoever asks.

Not the format, and not how keys are recognised (`serve.keys`). The one decision: a store gives its
text and takes a new one only in the place of the text that was read, so that two commands at once
cannot lose a key, in a file as in a Secret. A key leaves here once, as the result of `create_key`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from cluster.errors import CommandError, UsageError
from serve.errors import ConfigurationError
from serve.keys import (
    MAX_KEYS,
    ApiKey,
    generate_key,
    hash_key,
    is_key_name,
    parse_keys,
    render_keys,
)

KEY_VARIABLE = "SHOAL_API_KEY"
SECRET_KEY = "keys"
_MOST_DAYS = 36_500
_MAX_TRIES = 20
_LIFETIME = re.compile(r"([0-9]{1,6})([hdw])")
_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")

Keys = tuple[ApiKey, ...]


class KeyStore(Protocol):
    """A text somewhere: a local file, or one key of a Secret (`cluster.kube.SecretStore`)."""

    @property
    def place(self) -> str:
        """Where it is, for a message."""

    @property
    def options(self) -> str:
        """What leads a command to it: empty, or options with a space before each."""

    def read(self) -> str | None:
        """The text; None where there is none yet."""

    def write(self, text: str, previous: str | None) -> None:
        """Put `text` in the place of `previous`; raises where something else is there by now."""


class ChangedError(CommandError):
    """Somebody else wrote between our reading and our writing."""


class FileStore:
    """A file that only its owner reads, replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self._path = Path(os.path.realpath(path.expanduser()))

    @property
    def place(self) -> str:
        """The file's path."""
        return str(self._path)

    @property
    def options(self) -> str:
        """`--file`, unless it is the file that commands take anyway."""
        return (
            "" if self._path == Path(os.path.realpath(default_path())) else f" --file {self._path}"
        )

    def read(self) -> str | None:
        """The text; None without the file.

        Raises:
            UsageError: it cannot be read.
        """
        try:
            return self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except UnicodeDecodeError:
            raise UsageError(f"{self._path}: is not UTF-8 text") from None
        except OSError as exc:
            raise UsageError(f"{self._path}: {exc.strerror}") from exc

    def write(self, text: str, previous: str | None) -> None:
        """Replace the file by one rename, while no other `write` does, making its folder.

        Raises:
            ChangedError: the file no longer holds `previous`.
            UsageError: it cannot be written.
        """
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(self._path.parent):
                if self.read() != previous:
                    raise ChangedError(f"{self._path} was changed at the same time")
                self._replace(text)
        except OSError as exc:
            raise UsageError(f"{self._path} cannot be written: {exc.strerror}") from exc

    def _replace(self, text: str) -> None:
        number, draft = tempfile.mkstemp(dir=self._path.parent, prefix=".keys-")  # mode 0600
        try:
            with os.fdopen(number, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(number)
            os.replace(draft, self._path)
        except OSError:
            Path(draft).unlink(missing_ok=True)
            raise


def default_path() -> Path:
    """The file of keys where none is named: below XDG_CONFIG_HOME, else ~/.config."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    root = Path(base) if base.startswith("/") else Path("~/.config").expanduser()
    return root / "shoal" / "keys.yaml"


def create_key(store: KeyStore, name: str, *, lifetime: timedelta | None = None) -> str:
    """Add a new key to `store` and return it: it is nowhere else.

    Raises:
        UsageError: the name cannot be used or is taken, or the store is full or unusable.
    """
    if not is_key_name(name):
        raise UsageError(
            f"a key's name is 1 to 64 of A-Z a-z 0-9 . _ @ -, starting with a letter or digit,"
            f" got {name[:80]!r}"
        )
    key = generate_key()
    now = datetime.now(UTC).replace(microsecond=0)
    expires = None if lifetime is None else now + lifetime
    added = ApiKey(name, hash_key(key), now, expires)

    def add(keys: Keys) -> Keys:
        if any(existing.name == name for existing in keys):
            revoke = f"shoal keys revoke {name}{store.options}"
            raise UsageError(
                f"{store.place} has a key named {name!r} already",
                hint=f"Choose another name, or revoke it first: {revoke}",
            )
        if len(keys) >= MAX_KEYS:
            raise UsageError(f"{store.place} must hold <= {MAX_KEYS} keys, and it does hold them")
        return (*keys, added)

    _update(store, add)
    return key


def list_keys(store: KeyStore) -> Keys:
    """What is kept of every key, in the order of the store.

    Raises:
        UsageError: the store cannot be used.
    """
    return _parse(store, store.read())


def revoke_key(store: KeyStore, name: str) -> None:
    """Remove a key.

    Raises:
        UsageError: there is none of that name; names those that are there.
    """

    def remove(keys: Keys) -> Keys:
        if not any(key.name == name for key in keys):
            names = ", ".join(key.name for key in keys) or "none"
            raise UsageError(
                f"{store.place} has no key named {name[:80]!r}", hint=f"Its keys: {names}"
            )
        return tuple(key for key in keys if key.name != name)

    _update(store, remove)


def has_usable_key(keys: Keys) -> bool:
    """Whether a client could be let in now."""
    now_s = datetime.now(UTC).timestamp()
    return any(not key.is_expired(now_s) for key in keys)


def parse_lifetime(text: str) -> timedelta:
    """`12h`, `30d` or `8w` as a time.

    Raises:
        UsageError: it is none of these, or zero, or longer than a century.
    """
    match = _LIFETIME.fullmatch(text)
    lifetime = int(match.group(1)) * _UNITS[match.group(2)] if match else timedelta()
    if not timedelta() < lifetime <= timedelta(days=_MOST_DAYS):
        raise UsageError(
            f"--expires must be hours, days or weeks as 12h, 30d or 8w, <= {_MOST_DAYS}d,"
            f" got {text[:80]!r}"
        )
    return lifetime


def own_key(key_file: Path | None) -> str | None:
    """The key that this user's commands send: of `key_file`, else of SHOAL_API_KEY, else none.

    Raises:
        UsageError: what is there is no key.
    """
    if key_file is not None:
        source = f"--key-file {key_file}"
        try:
            text = key_file.expanduser().read_text(encoding="utf-8", errors="replace").strip()
        except OSError as exc:
            raise UsageError(f"{source}: {exc.strerror}") from exc
    else:
        source, text = KEY_VARIABLE, os.environ.get(KEY_VARIABLE, "").strip()
        if not text:
            return None
    if not _TOKEN.fullmatch(text):
        raise UsageError(
            f"{source} must be one API key in one line",
            hint="A file of hashes (shoal keys) holds no key that could be sent.",
        )
    return text


def _update(store: KeyStore, change: Callable[[Keys], Keys]) -> None:
    for _ in range(_MAX_TRIES - 1):
        with contextlib.suppress(ChangedError):
            _update_once(store, change)
            return
    _update_once(store, change)


def _update_once(store: KeyStore, change: Callable[[Keys], Keys]) -> None:
    previous = store.read()
    store.write(render_keys(change(_parse(store, previous))), previous)


def _parse(store: KeyStore, text: str | None) -> Keys:
    try:
        return parse_keys(text or "", source=store.place)
    except ConfigurationError as exc:
        raise UsageError(exc.message) from exc


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)
