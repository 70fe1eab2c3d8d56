"""API keys: the file that holds their hashes, making a key, and the ring that recognises one.

Not HTTP (`serve.ingress.auth`) and not where files are written (`cluster.keys`). The one decision:
a key is 256 random bits, so one plain SHA-256 of it is enough to store, and what is stored cannot
be used to call the API. The same text is a local file and a key of a Kubernetes Secret::

    # API keys of Shoal, as hashes. Made by `shoal keys`.
    keys:
    - name: alice                  # 1 to 64 of A-Z a-z 0-9 . _ @ -; unique
      sha256: 2bb80d53...          # SHA-256 of the whole key, 64 hexadecimal digits; unique
      created: 2026-11-22T09:30:00Z
      expires: 2026-12-22T09:30:00Z   # optional; a time without a zone is UTC

It is YAML, so JSON as well. No value of a file is ever part of a message, for it may be a key.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml

from serve.errors import ConfigurationError

KEY_PREFIX = "sk-shoal-"
MAX_KEYS = 1000
MAX_FILE_BYTES = 1024 * 1024
NUM_RANDOM_BYTES = 32
_RELOAD_PERIOD_S = 1.0
_HEADER = "# API keys of Shoal, as hashes. Made by `shoal keys`.\n"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_RAW_KEY = re.compile(r"\bsk-[A-Za-z0-9_-]{16,}")
_FIELDS = ("name", "sha256", "created", "expires")

_log = logging.getLogger("shoal.keys")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is kept of a key. `digest` is the key's SHA-256, 32 bytes; times are aware."""

    name: str
    digest: bytes
    created: datetime
    expires: datetime | None = None

    def is_expired(self, now_s: float) -> bool:
        """Whether it must not be accepted at `now_s`, in seconds since the epoch."""
        return self.expires is not None and self.expires.timestamp() <= now_s


def generate_key() -> str:
    """A new key of 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(NUM_RANDOM_BYTES)


def hash_key(key: str) -> bytes:
    """What is stored of `key`: its SHA-256, 32 bytes."""
    return hashlib.sha256(key.encode()).digest()


def is_key_name(text: str) -> bool:
    """Whether `text` can name a key; what looks like a key itself cannot."""
    return _NAME.fullmatch(text) is not None and _RAW_KEY.search(text) is None


def parse_keys(text: str, *, source: str) -> tuple[ApiKey, ...]:
    """The keys of a file's text; an empty text holds none.

    Raises:
        ConfigurationError: as `source:line: what is wrong`, without the value.
    """
    problem = _KeysProblem(source)
    if len(text) > MAX_FILE_BYTES:
        raise problem.at(1, f"must be <= {MAX_FILE_BYTES} characters, got {len(text)}")
    for number, line in enumerate(text.splitlines(), start=1):
        if _RAW_KEY.search(line):
            raise problem.at(
                number,
                "holds a key itself, but only hashes belong here: whoever read this file can use"
                " it. Remove it, and make another one by `shoal keys create NAME`",
            )
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark
        raise problem.at(mark.line + 1 if mark else 1, "is not YAML") from None
    except (yaml.YAMLError, RecursionError):
        raise problem.at(1, "is not YAML") from None
    return () if root is None else _parse_root(root, problem)


def render_keys(keys: Iterable[ApiKey]) -> str:
    """The text of a file that holds `keys`; `parse_keys` reads it back."""
    entries = [
        {
            "name": key.name,
            "sha256": key.digest.hex(),
            "created": _render_time(key.created),
            **({} if key.expires is None else {"expires": _render_time(key.expires)}),
        }
        for key in keys
    ]
    return _HEADER + yaml.safe_dump({"keys": entries}, sort_keys=False)


def read_keys_file(path: Path) -> tuple[ApiKey, ...]:
    """The keys of the file at `path`.

    Raises:
        ConfigurationError: it cannot be read or used.
    """
    return _read(path)[1]


class KeyRing:
    """The keys of a file, followed as it changes; looked up on every request.

    The file is looked at again at most once a second, through symbolic links, so that the swap of
    a Secret's volume is seen. A new file that cannot be used, or none, changes nothing and is
    logged once.

    Raises:
        ConfigurationError: the file cannot be used at the start.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._clock = clock
        self._monotonic = monotonic
        self._signature, self._keys = _read(path)
        self._next_look_s = monotonic() + _RELOAD_PERIOD_S
        self._is_missing = False

    def find(self, presented: str) -> str | None:
        """The name of the key that `presented` is; None where it is none, or has expired.

        The time it takes depends on the number of keys, not on which of them is meant.
        """
        self._follow()
        digest = hash_key(presented)
        found: ApiKey | None = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        if found is None or found.is_expired(self._clock()):
            return None
        return found.name

    def _follow(self) -> None:
        now_s = self._monotonic()
        if now_s < self._next_look_s:
            return
        self._next_look_s = now_s + _RELOAD_PERIOD_S
        try:
            signature = _signature_of(os.stat(self._path))
        except OSError as exc:
            if not self._is_missing:
                _log.error("keys file %s: %s; the keys stay as they were", self._path, exc.strerror)
            self._is_missing = True
            return
        self._is_missing = False
        if signature != self._signature:
            self._signature = signature
            self._reload()

    def _reload(self) -> None:
        try:
            self._signature, self._keys = _read(self._path)
        except ConfigurationError as exc:
            _log.error("%s; the keys stay as they were", exc.message)
        else:
            _log.info("keys file %s: %d keys", self._path, len(self._keys))


Signature = tuple[int, int, int, int]


def _signature_of(found: os.stat_result) -> Signature:
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _read(path: Path) -> tuple[Signature, tuple[ApiKey, ...]]:
    """The keys, and the signature of the very file that they were read from."""
    try:
        with path.open("rb") as file:
            signature = _signature_of(os.fstat(file.fileno()))
            text = file.read(MAX_FILE_BYTES + 1).decode("utf-8")
    except OSError as exc:
        raise ConfigurationError(f"keys file {path}: {exc.strerror}") from exc
    except UnicodeDecodeError:
        raise ConfigurationError(f"keys file {path}: is not UTF-8 text") from None
    return signature, parse_keys(text, source=str(path))


class _KeysProblem:
    """Makes the errors of one file."""

    def __init__(self, source: str) -> None:
        self._source = source

    def at(self, line: int, message: str) -> ConfigurationError:
        return ConfigurationError(f"{self._source}:{line}: {message}")

    def of(self, node: yaml.Node, message: str) -> ConfigurationError:
        return self.at(node.start_mark.line + 1, message)


def _parse_root(root: yaml.Node, problem: _KeysProblem) -> tuple[ApiKey, ...]:
    fields = _fields(root, ("keys",), problem)
    entries = fields.get("keys")
    if entries is None or _is_null(entries):
        return ()
    if not isinstance(entries, yaml.SequenceNode):
        raise problem.of(entries, "keys: must be a list")
    if len(entries.value) > MAX_KEYS:
        raise problem.of(entries, f"keys: must be <= {MAX_KEYS}, got {len(entries.value)}")
    keys: list[ApiKey] = []
    lines_of: dict[str | bytes, int] = {}
    for entry in entries.value:
        key = _parse_entry(entry, problem)
        for field, value in (("name", key.name), ("sha256", key.digest)):
            if value in lines_of:
                raise problem.of(entry, f"{field} is the same as in line {lines_of[value]}")
            lines_of[value] = entry.start_mark.line + 1
        keys.append(key)
    return tuple(keys)


def _parse_entry(entry: yaml.Node, problem: _KeysProblem) -> ApiKey:
    fields = _fields(entry, _FIELDS, problem)
    for required in _FIELDS[:3]:
        if required not in fields:
            raise problem.of(entry, f"{required} is missing")
    name, sha256 = fields["name"], fields["sha256"]
    if not isinstance(name, yaml.ScalarNode) or not is_key_name(name.value):
        raise problem.of(
            name, "name must be 1 to 64 of A-Z a-z 0-9 . _ @ - and start with a letter or digit"
        )
    if not isinstance(sha256, yaml.ScalarNode) or not _SHA256.fullmatch(sha256.value):
        raise problem.of(
            sha256, "sha256 must be the 64 hexadecimal digits of the key's SHA-256, not the key"
        )
    expires = fields.get("expires")
    return ApiKey(
        name=name.value,
        digest=bytes.fromhex(sha256.value),
        created=_parse_time(fields["created"], "created", problem),
        expires=None
        if expires is None or _is_null(expires)
        else _parse_time(expires, "expires", problem),
    )


def _fields(
    node: yaml.Node, allowed: tuple[str, ...], problem: _KeysProblem
) -> dict[str, yaml.Node]:
    """The values of a mapping, as nodes, so that each keeps its line and its spelling."""
    if not isinstance(node, yaml.MappingNode):
        raise problem.of(node, f"must be a mapping with {', '.join(allowed)}")
    fields: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value not in allowed:
            raise problem.of(key, f"unknown field; known here: {', '.join(allowed)}")
        if key.value in fields:
            raise problem.of(key, f"{key.value} is written twice")
        fields[key.value] = value
    return fields


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _parse_time(node: yaml.Node, field: str, problem: _KeysProblem) -> datetime:
    try:
        found = datetime.fromisoformat(str(node.value))
        return found.replace(tzinfo=found.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError):
        raise problem.of(node, f"{field} must be a time as 2026-12-31T23:59:59Z") from None


def _render_time(moment: datetime) -> str:
    return moment.astimezone(UTC).replace(microsecond=0, tzinfo=None).isoformat() + "Z"
