"""The private folder of one named Shoal: state, logs, sockets, token, Ray's session.

Not in the home folder, and always under /tmp, whatever TMPDIR says: Ray's sockets live deep below
it and a Unix socket's path must stay under 100 bytes. The one decision: a folder appears under its
name by one rename, complete with a state that names its owner, so two starts of one name cannot
both win, and a folder whose owner is gone can be recognised and cleaned.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.errors import AlreadyRunningError, NotRunningError, UsageError

from .addresses import contact_host, listening_addresses, url_of
from .processes import ProcessId

DEFAULT_NAME = "default"
_NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,11}")


@dataclass(frozen=True, slots=True)
class RunState:
    """What is known of a run by anybody who reads its folder. Times in seconds since the epoch."""

    name: str
    run_id: str
    owner: ProcessId
    started_at: float
    phase: str = "configuration"
    host: str = "127.0.0.1"
    port: int = 0
    dashboard_port: int = 0
    models: tuple[str, ...] = ()
    processes: tuple[ProcessId, ...] = ()

    @property
    def contact_host(self) -> str:
        """The address at which this machine reaches the API."""
        return contact_host(self.host)

    @property
    def address(self) -> str:
        """Where the API and the page are, for this machine."""
        return url_of(self.contact_host, self.port)

    @property
    def addresses(self) -> list[str]:
        """Where the API and the page are, for others as well."""
        return [url_of(host, self.port) for host in listening_addresses(self.host)]

    @property
    def dashboard_address(self) -> str:
        """Where Ray's dashboard is."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    def is_owned(self) -> bool:
        """Whether the process that supervises this run lives."""
        return self.owner.find() is not None

    @classmethod
    def parse(cls, text: str) -> RunState:
        """Rebuild what `render` wrote."""
        fields: dict[str, Any] = json.loads(text)
        fields["owner"] = ProcessId(**fields["owner"])
        fields["processes"] = tuple(ProcessId(**process) for process in fields["processes"])
        fields["models"] = tuple(fields["models"])
        return cls(**fields)

    def render(self) -> str:
        return json.dumps(asdict(self), indent=1)


@dataclass(slots=True)
class RunFolder:
    """The folder of one run and the state in it."""

    path: Path
    state: RunState
    is_removed: bool = field(default=False, init=False)

    @property
    def ray_path(self) -> Path:
        """Ray's temporary directory; the name is short, for Ray's sockets are below it."""
        return self.path / "r"

    @property
    def temp_path(self) -> Path:
        """TMPDIR of every process of the run."""
        return self.path / "tmp"

    @property
    def progress_path(self) -> Path:
        """Where replicas write how far their shards have loaded."""
        return self.path / "progress"

    @property
    def proxy_path(self) -> Path:
        """HAProxy's configuration, sockets and launcher; short, Ray adds 57 bytes to it."""
        return self.path / "p"

    @property
    def log_path(self) -> Path:
        """What the supervisor and the starter of Ray print."""
        return self.path / "shoal.log"

    @property
    def token_path(self) -> Path:
        """Ray's token: the password of the dashboard."""
        return self.path / "token"

    @property
    def session_logs_path(self) -> Path:
        """Logs of Ray's processes and of every actor."""
        return self.ray_path / "session_latest" / "logs"

    def adopt(self) -> None:
        """Make the calling process the owner of the run (a fork of the former one)."""
        self.update(owner=ProcessId.of(_this_process()))

    def update(self, **changes: Any) -> None:
        """Change fields of the state, in memory and, by one rename, on disk."""
        self.state = replace(self.state, **changes)
        draft = self.path / "state.json.new"
        draft.write_text(self.state.render(), encoding="utf-8")
        draft.replace(self.path / "state.json")

    def remove(self) -> None:
        """Delete the folder, and the folder of all runs if this was the last."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.is_removed = True
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()


def runs_path() -> Path:
    """Where the folders of this user's runs are."""
    return Path(f"/tmp/shoal-{os.getuid()}")


def create_run(name: str, *, root: Path | None = None) -> RunFolder:
    """Make the folder of a new run, owned by this process.

    Raises:
        AlreadyRunningError: there is a folder of that name; a stale one must be cleaned first.
        UsageError: the name cannot be used, or somebody else owns the folder of all runs.
    """
    check_name(name)
    root = _prepare_root(runs_path() if root is None else root)
    owner = ProcessId.of(_this_process())
    state = RunState(name, secrets.token_hex(8), owner, started_at=time.time())
    draft = RunFolder(root / f".{name}-{state.run_id}", state)
    draft.path.mkdir(mode=0o700)
    try:
        for path in (draft.temp_path, draft.progress_path, draft.proxy_path):
            path.mkdir(mode=0o700)
        draft.token_path.touch(mode=0o600)
        draft.token_path.write_text(secrets.token_hex(32), encoding="ascii")
        draft.update()
        os.rename(draft.path, root / name)
    except OSError as exc:
        draft.remove()
        raise AlreadyRunningError(f"a Shoal named {name!r} has a folder already") from exc
    return RunFolder(root / name, state)


def open_run(name: str, *, root: Path | None = None) -> RunFolder:
    """The folder of an existing run, whether its owner lives or not.

    Raises:
        NotRunningError: there is none.
    """
    check_name(name)
    path = (runs_path() if root is None else root) / name
    try:
        state = RunState.parse((path / "state.json").read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise NotRunningError(
            f"no Shoal named {name!r} is running", hint="Start one with: shoal up"
        ) from exc
    return RunFolder(path, state)


def list_runs(*, root: Path | None = None) -> list[RunFolder]:
    """Every run of this user, by name."""
    root = runs_path() if root is None else root
    found = []
    for path in sorted(root.glob("[!.]*/state.json")):
        with contextlib.suppress(NotRunningError):
            found.append(open_run(path.parent.name, root=root))
    return found


def check_name(name: str) -> None:
    """Refuse a name that cannot be part of a short path.

    Raises:
        UsageError: says what a name looks like.
    """
    if not _NAME_PATTERN.fullmatch(name):
        raise UsageError(
            f"a name is 1 to 12 of a-z, 0-9 and '-', not starting with '-', got {name!r}"
        )


def _prepare_root(root: Path) -> Path:
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode=0o700)
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UsageError(
            f"{root} must be a folder of yours that nobody else may read",
            hint=f"Look at it (ls -ld {root}) and remove it.",
        )
    return root


def _this_process() -> Any:
    import psutil

    return psutil.Process()
